#include "attention/sharded_attention.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/pages.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// The pages that hold positions of `range`.
absl::Span<const PageRef> PagesOf(absl::Span<const PageRef> pages, PositionRange range) {
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  const auto begin = std::lower_bound(pages.begin(), pages.end(), PageOf(range.begin), before);
  const auto end = std::lower_bound(begin, pages.end(), PageCount(range.end), before);
  return pages.subspan(begin - pages.begin(), end - begin);
}

// One array for what several steps reduce together, one behind the other. Not cleared: each fills its own.
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

struct MergingSteps {
  // Outlive the steps.
  Message<int64_t> sink_sums{0};
  Message<float> maxima{0};
  Message<int64_t> maximum_sums{0};
  std::vector<std::unique_ptr<AttentionStep>> steps;
};

// The sink path of all steps, through host memory.
absl::Status SumOnHost(Communicator* communicator, absl::Span<const StepArgs> args, int64_t sink_words,
                       absl::Time deadline, MergingSteps& merging) {
  merging.sink_sums = Message<int64_t>(sink_words);
  for (size_t i = 0; i < args.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(merging.steps[i]->Attend());
    if (!args[i].has_sinks()) continue;
    // Now, while the device has what Attend made.
    EDUBA_RETURN_IF_ERROR(merging.steps[i]->SinkSums(
        merging.sink_sums.Next(args[i].row_heads() * args[i].words_per_row_head())));
  }
  if (communicator == nullptr || sink_words == 0) return absl::OkStatus();
  return communicator->SumI64(merging.sink_sums.all(), deadline);
}

// The same without leaving the GPU. `sums` is null where there is nobody to sum with.
absl::Status SumOnGpu(Backend& backend, Communicator* communicator, DeviceSums* sums,
                      absl::Span<const StepArgs> args, int64_t sink_words, absl::Time deadline,
                      MergingSteps& merging) {
  int64_t* words = nullptr;
  if (sums != nullptr && sink_words > 0) {
    EDUBA_ASSIGN_OR_RETURN(words, sums->Words(sink_words));
  }
  for (size_t i = 0; i < args.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(merging.steps[i]->Attend());
    if (!args[i].has_sinks()) continue;
    EDUBA_RETURN_IF_ERROR(merging.steps[i]->queued()->QueueSums(words));
    if (words != nullptr) words += args[i].row_heads() * args[i].words_per_row_head();
  }
  if (words != nullptr) EDUBA_RETURN_IF_ERROR(sums->Start(backend.stream(), {}, deadline));
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i].has_sinks()) EDUBA_RETURN_IF_ERROR(merging.steps[i]->queued()->QueueFold());
  }
  if (words != nullptr) return sums->Finish(deadline);
  // A group of one may have been ended all the same.
  return communicator == nullptr || sink_words == 0 ? absl::OkStatus() : communicator->SumI64({}, deadline);
}

// Everything up to the last collective.
absl::Status Merge(Backend& backend, Communicator* communicator, absl::Span<const StepArgs> args,
                   absl::Time deadline, MergingSteps& merging, std::vector<AttentionAnswer>& answers) {
  int64_t sink_words = 0;
  for (const StepArgs& one : args) {
    EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<AttentionStep> step, backend.StartStep(one));
    merging.steps.push_back(std::move(step));
    if (one.has_sinks()) sink_words += one.row_heads() * one.words_per_row_head();
  }
  const bool is_alone = communicator == nullptr || communicator->size() == 1;
  DeviceSums* const sums = is_alone ? nullptr : communicator->device_sums();
  const bool stays = backend.gpu() >= 0 && (is_alone || (sums != nullptr && sums->gpu() == backend.gpu()));
  EDUBA_RETURN_IF_ERROR(stays ? SumOnGpu(backend, communicator, sums, args, sink_words, deadline, merging)
                              : SumOnHost(communicator, args, sink_words, deadline, merging));
  for (size_t i = 0; i < args.size(); ++i) answers[i].collectives += args[i].has_sinks() ? 1 : 0;

  std::vector<int64_t> selected(args.size());
  int64_t floats = 0;
  int64_t words = 0;
  for (size_t i = 0; i < args.size(); ++i) {
    EDUBA_ASSIGN_OR_RETURN(const absl::Span<const int64_t> own, merging.steps[i]->SelectForMaximum());
    for (const int64_t row_head : own) ++answers[i].row_heads_maximum[row_head / args[i].shape.query_heads];
    selected[i] = static_cast<int64_t>(own.size());
    floats += selected[i] * args[i].maxima_per_row_head();
    words += selected[i] * args[i].words_per_row_head();
    if (selected[i] > 0) answers[i].collectives += 2;
  }
  if (words == 0) return absl::OkStatus();
  merging.maxima = Message<float>(floats);
  for (size_t i = 0; i < args.size(); ++i) {
    if (selected[i] == 0) continue;
    EDUBA_RETURN_IF_ERROR(
        merging.steps[i]->Maxima(merging.maxima.Next(selected[i] * args[i].maxima_per_row_head())));
  }
  if (communicator != nullptr) {
    EDUBA_RETURN_IF_ERROR(communicator->MaxF32(merging.maxima.all(), deadline));
  }
  merging.maximum_sums = Message<int64_t>(words);
  for (size_t i = 0; i < args.size(); ++i) {
    if (selected[i] == 0) continue;
    EDUBA_RETURN_IF_ERROR(
        merging.steps[i]->MaximumSums(merging.maximum_sums.Next(selected[i] * args[i].words_per_row_head())));
  }
  if (communicator == nullptr) return absl::OkStatus();
  return communicator->SumI64(merging.maximum_sums.all(), deadline);
}

}  // namespace

absl::StatusOr<std::vector<AttentionAnswer>> AttendPages(Backend& backend, Communicator* communicator,
                                                         absl::Span<const StepArgs> steps,
                                                         absl::Time deadline) {
  std::vector<AttentionAnswer> answers(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    answers[i].row_heads_maximum.resize(steps[i].rows);
    answers[i].outputs.resize(steps[i].row_heads() * steps[i].shape.value_dim);
    answers[i].lse.resize(steps[i].row_heads());
    answers[i].sink_mass.resize(steps[i].row_heads());
  }
  MergingSteps merging;
  const absl::Status merged = Merge(backend, communicator, steps, deadline, merging, answers);
  if (!merged.ok()) {
    if (communicator != nullptr) communicator->Abort(merged);
    return merged;
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    AttentionAnswer& answer = answers[i];
    // Non-finite arithmetic travels inside the sums: every rank learns of it here, and none is waiting.
    EDUBA_RETURN_IF_ERROR(
        merging.steps[i]->Finish(answer.outputs.data(), answer.lse.data(), answer.sink_mass.data()));
    answer.bytes_read = merging.steps[i]->bytes_read();
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

  std::vector<PositionRange> visible(rows);
  std::vector<int32_t> visible_sinks(rows);
  PositionRange seen{INT64_MAX, 0};  // By any row.
  for (int64_t row = 0; row < rows; ++row) {
    const Visibility v =
        VisibleTo(query.policy, query.positions[row], spec.sink_tokens, spec.window, query.length);
    visible[row] = v.keys;
    visible_sinks[row] = v.sinks;
    if (!v.keys.empty()) seen = {std::min(seen.begin, v.keys.begin), std::max(seen.end, v.keys.end)};
  }

  StepArgs args;
  args.shape = spec.shape;
  args.rows = static_cast<int>(rows);
  args.queries = query.queries.data();
  args.visible = visible;
  if (!seen.empty()) args.pages = PagesOf(sequence.pages(query.layer).refs(), seen);
  args.sink_pages = sequence.sink_pages(query.layer).refs();
  args.visible_sinks = visible_sinks;
  args.sink_logits = spec.sink_logits;
  args.exponents = sequence.exponents(query.layer, query.length);
  args.positions = query.length;
  args.first_row = query.first_row;
  args.cancelled = query.cancelled;

  EDUBA_ASSIGN_OR_RETURN(std::vector<AttentionAnswer> answers,
                         AttendPages(backend, &communicator, absl::MakeConstSpan(&args, 1), deadline));
  return std::move(answers.front());
}

}  // namespace eduba
