#include "attention/sharded_attention.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "attention/step_inputs.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// One array for what several steps reduce together, one step after the other. It is not cleared, because each
// step fills its own part.
template <class T>
class Message {
 public:
  explicit Message(int64_t size) : numbers_(std::make_unique_for_overwrite<T[]>(size)), size_(size) {}

  absl::Span<T> Next(int64_t count) {
    const absl::Span<T> next(numbers_.get() + next_, count);
    next_ += count;
    return next;
  }
  absl::Span<T> all() const { return {numbers_.get(), static_cast<size_t>(size_)}; }

 private:
  std::unique_ptr<T[]> numbers_;
  int64_t size_;
  int64_t next_ = 0;
};

// Steps, and who gets their answers.
struct Merge {
  Merge(Backend& backend, Communicator* communicator, absl::Span<const StepArgs> args,
        absl::Span<const int> owners, absl::Time deadline)
      : backend(backend), communicator(communicator), args(args), owners(owners), deadline(deadline) {}

  Backend& backend;
  Communicator* const communicator;  // Or none.
  const absl::Span<const StepArgs> args;
  const absl::Span<const int> owners;  // [steps], or none: every rank.
  const absl::Time deadline;
  // Outlive the steps.
  Message<int64_t> sink_sums{0};
  Message<float> maxima{0};
  Message<int64_t> maximum_sums{0};
  std::vector<std::unique_ptr<AttentionStep>> steps;

  bool is_own(size_t step) const { return owners.empty() || owners[step] == communicator->rank(); }
  // [ranks]: words(step) of the steps of each, as ReduceScatterI64 takes them; empty where every rank
  // answers.
  template <class Words>
  std::vector<int64_t> Parts(const Words& words) const {
    std::vector<int64_t> parts(owners.empty() ? 0 : communicator->size());
    for (size_t i = 0; i < owners.size(); ++i) parts[owners[i]] += words(i);
    return parts;
  }
  int64_t SinkWords(size_t step) const {
    return args[step].has_sinks() ? args[step].row_heads() * args[step].words_per_row_head() : 0;
  }
};

// To all ranks, or `parts` to those whose they are.
absl::Status Sum(const Merge& merge, absl::Span<int64_t> words, absl::Span<const int64_t> parts) {
  if (merge.communicator == nullptr) return absl::OkStatus();
  return parts.empty() ? merge.communicator->SumI64(words, merge.deadline)
                       : merge.communicator->ReduceScatterI64(words, parts, merge.deadline);
}

// The sink path of all steps, through host memory.
absl::Status SumOnHost(Merge& merge, int64_t sink_words, absl::Span<const int64_t> parts) {
  merge.sink_sums = Message<int64_t>(sink_words);
  for (size_t i = 0; i < merge.args.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->Attend());
    if (!merge.args[i].has_sinks()) continue;
    // Now, while the device has what Attend made.
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->SinkSums(merge.sink_sums.Next(merge.SinkWords(i))));
  }
  return sink_words == 0 ? absl::OkStatus() : Sum(merge, merge.sink_sums.all(), parts);
}

// The same without leaving the GPU. `sums` is null where there is nobody to sum with.
absl::Status SumOnGpu(Merge& merge, DeviceSums* sums, int64_t sink_words, absl::Span<const int64_t> parts) {
  int64_t* words = nullptr;
  if (sums != nullptr && sink_words > 0) {
    EDUBA_ASSIGN_OR_RETURN(words, sums->Words(sink_words));
  }
  for (size_t i = 0; i < merge.args.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->Attend());
    if (!merge.args[i].has_sinks()) continue;
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->queued()->QueueSums(words));
    if (words != nullptr) words += merge.SinkWords(i);
  }
  if (words != nullptr) {
    EDUBA_RETURN_IF_ERROR(sums->Start(merge.backend.stream(), parts, merge.deadline));
  }
  for (size_t i = 0; i < merge.args.size(); ++i) {
    if (merge.args[i].has_sinks() && merge.is_own(i)) {
      EDUBA_RETURN_IF_ERROR(merge.steps[i]->queued()->QueueFinalise());
    }
  }
  if (words != nullptr) return sums->Finish(merge.deadline);
  // A group of one may have been ended all the same.
  return sink_words == 0 ? absl::OkStatus() : Sum(merge, {}, {});
}

using RowHeads = std::vector<int64_t>;

// What each step selects for the maximum path, of steps that one rank each answers. Where there are sinks
// only that rank can tell: all learn it by a sum of bits, to which everybody else adds zeros.
absl::StatusOr<std::vector<RowHeads>> ShareSelections(Merge& merge) {
  constexpr int64_t kBits = 64;
  std::vector<RowHeads> selected(merge.args.size());
  std::vector<int64_t> first_word(merge.args.size() + 1);  // Where each step's bits begin.
  for (size_t i = 0; i < merge.args.size(); ++i) {
    const StepArgs& args = merge.args[i];
    first_word[i + 1] = first_word[i] + (args.has_sinks() ? (args.row_heads() + kBits - 1) / kBits : 0);
    if (args.has_sinks() && !merge.is_own(i)) continue;
    EDUBA_ASSIGN_OR_RETURN(const auto own, merge.steps[i]->SelectForMaximum());
    selected[i].assign(own.begin(), own.end());
  }
  if (first_word.back() == 0) return selected;
  std::vector<int64_t> bits(first_word.back());
  for (size_t i = 0; i < merge.args.size(); ++i) {
    if (!merge.args[i].has_sinks()) continue;
    for (const int64_t row_head : selected[i]) {
      int64_t& word = bits[first_word[i] + row_head / kBits];
      word = static_cast<int64_t>(static_cast<uint64_t>(word) | uint64_t{1} << row_head % kBits);
    }
  }
  EDUBA_RETURN_IF_ERROR(merge.communicator->SumI64(absl::MakeSpan(bits), merge.deadline));
  for (size_t i = 0; i < merge.args.size(); ++i) {
    if (!merge.args[i].has_sinks() || merge.is_own(i)) continue;
    for (int64_t row_head = 0; row_head < merge.args[i].row_heads(); ++row_head) {
      const auto word = static_cast<uint64_t>(bits[first_word[i] + row_head / kBits]);
      if ((word >> row_head % kBits & 1) != 0) selected[i].push_back(row_head);
    }
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->TakeSelection(selected[i]));
  }
  return selected;
}

absl::StatusOr<std::vector<RowHeads>> SelectForMaximum(Merge& merge) {
  if (!merge.owners.empty()) return ShareSelections(merge);
  std::vector<RowHeads> selected;
  for (const auto& step : merge.steps) {
    EDUBA_ASSIGN_OR_RETURN(const auto own, step->SelectForMaximum());
    selected.emplace_back(own.begin(), own.end());
  }
  return selected;
}

// Everything up to the last collective.
absl::Status MergeAll(Merge& merge, std::vector<AttentionAnswer>& answers) {
  const absl::Span<const StepArgs> args = merge.args;
  int64_t sink_words = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<AttentionStep> step, merge.backend.StartStep(args[i]));
    merge.steps.push_back(std::move(step));
    sink_words += merge.SinkWords(i);
  }
  const std::vector<int64_t> sink_parts = merge.Parts([&](size_t i) { return merge.SinkWords(i); });
  const bool is_alone = merge.communicator == nullptr || merge.communicator->size() == 1;
  DeviceSums* const sums = is_alone ? nullptr : merge.communicator->device_sums();
  const bool stays =
      merge.backend.gpu() >= 0 && (is_alone || (sums != nullptr && sums->gpu() == merge.backend.gpu()));
  EDUBA_RETURN_IF_ERROR(stays ? SumOnGpu(merge, sums, sink_words, sink_parts)
                              : SumOnHost(merge, sink_words, sink_parts));

  EDUBA_ASSIGN_OR_RETURN(const std::vector<RowHeads> selected, SelectForMaximum(merge));
  const auto maximum_words = [&](size_t i) {
    return static_cast<int64_t>(selected[i].size()) * args[i].words_per_row_head();
  };
  const auto maximum_floats = [&](size_t i) {
    return static_cast<int64_t>(selected[i].size()) * args[i].maxima_per_row_head();
  };
  int64_t floats = 0;
  int64_t words = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    answers[i].collectives = (args[i].has_sinks() ? 1 : 0) + (selected[i].empty() ? 0 : 2);
    floats += maximum_floats(i);
    words += maximum_words(i);
    if (!merge.is_own(i)) continue;
    answers[i].row_heads_maximum.resize(args[i].rows);
    for (const int64_t row_head : selected[i]) {
      ++answers[i].row_heads_maximum[row_head / args[i].shape.query_heads];
    }
  }
  if (words == 0) return absl::OkStatus();
  merge.maxima = Message<float>(floats);
  for (size_t i = 0; i < args.size(); ++i) {
    if (selected[i].empty()) continue;
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->Maxima(merge.maxima.Next(maximum_floats(i))));
  }
  if (merge.communicator != nullptr) {
    EDUBA_RETURN_IF_ERROR(merge.communicator->MaxF32(merge.maxima.all(), merge.deadline));
  }
  merge.maximum_sums = Message<int64_t>(words);
  for (size_t i = 0; i < args.size(); ++i) {
    if (selected[i].empty()) continue;
    EDUBA_RETURN_IF_ERROR(merge.steps[i]->MaximumSums(merge.maximum_sums.Next(maximum_words(i))));
  }
  return Sum(merge, merge.maximum_sums.all(), merge.Parts(maximum_words));
}

}  // namespace

absl::StatusOr<std::vector<AttentionAnswer>> AttendPages(Backend& backend, Communicator* communicator,
                                                         absl::Span<const StepArgs> steps,
                                                         absl::Span<const int> owners, absl::Time deadline) {
  EDUBA_CHECK(owners.empty() || (communicator != nullptr && owners.size() == steps.size() &&
                                 std::is_sorted(owners.begin(), owners.end())));
  std::vector<AttentionAnswer> answers(steps.size());
  Merge merge(backend, communicator, steps, owners, deadline);
  const absl::Status merged = MergeAll(merge, answers);
  if (!merged.ok()) {
    if (communicator != nullptr) communicator->Abort(merged);
    return merged;
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    AttentionAnswer& answer = answers[i];
    answer.bytes_read = merge.steps[i]->bytes_read();
    if (!merge.is_own(i)) continue;
    answer.outputs.resize(steps[i].row_heads() * steps[i].shape.value_dim);
    answer.lse.resize(steps[i].row_heads());
    answer.sink_mass.resize(steps[i].row_heads());
    // Non-finite arithmetic travels inside the sums: every rank that answers learns of it here, and none is
    // waiting.
    EDUBA_RETURN_IF_ERROR(
        merge.steps[i]->Finish(answer.outputs.data(), answer.lse.data(), answer.sink_mass.data()));
  }
  return answers;
}

absl::StatusOr<AttentionAnswer> AttendSharded(Backend& backend, Communicator& communicator,
                                              const Sequence& sequence, const AttentionQuery& query,
                                              absl::Time deadline) {
  const SequenceSpec& spec = sequence.spec();
  const auto rows = static_cast<int64_t>(query.positions.size());
  EDUBA_CHECK(query.layer >= 0 && query.layer < spec.layers);
  EDUBA_CHECK(query.length >= 1 && query.length <= sequence.length());
  EDUBA_CHECK_EQ(static_cast<int64_t>(query.queries.size()),
                 rows * spec.shape.query_heads * spec.shape.head_dim);

  StepArgs common;
  common.shape = spec.shape;
  common.queries = query.queries.data();
  common.sink_logits = spec.sink_logits;
  common.exponents = sequence.exponents(query.layer, query.length);
  common.positions = query.length;
  common.first_row = query.first_row;
  common.cancelled = query.cancelled;
  const StepInputs inputs(common, {query.policy, spec.sink_tokens, spec.window}, query.positions,
                          query.length, {&sequence.pages(query.layer), &sequence.sink_pages(query.layer)});

  EDUBA_ASSIGN_OR_RETURN(
      std::vector<AttentionAnswer> answers,
      AttendPages(backend, &communicator, absl::MakeConstSpan(&inputs.args, 1), {}, deadline));
  return std::move(answers.front());
}

}  // namespace eduba
