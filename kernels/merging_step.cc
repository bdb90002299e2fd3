#include "kernels/merging_step.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kernels/merge_kernels.h"
#include "kernels/portable_math.h"
#include "kernels/row_set.h"

namespace eduba {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Without value exponents of their own (a channel that is all zeros may carry any), powers of two stay in
// double's range.
constexpr int kMinExponent = -900;
constexpr int kMaxExponent = 900;
// Token sinks whose dot products with a query are summed side by side.
constexpr int64_t kSinksTogether = 4;

int MaximumPathFractionBits(int64_t positions) {
  return 62 - static_cast<int>(
                  std::bit_width(static_cast<uint64_t>(positions)));  // bit_width(n) = ceil(log2(n + 1))
}

std::vector<PositionRange> ClipToSequence(const StepArgs& args) {
  std::vector<PositionRange> ranges(args.visible.begin(), args.visible.end());
  for (PositionRange& range : ranges) range = range.Intersect({0, args.positions});
  return ranges;
}

// A worker's lists say which of its pages each row reads.
absl::Status ValidateLists(const StepArgs& args) {
  const PageLists& lists = args.lists;
  const auto entries = static_cast<int64_t>(lists.entries.size());
  if (lists.row_list.size() != static_cast<size_t>(args.rows)) {
    return absl::InvalidArgumentError(
        absl::StrCat("row_list names the lists of ", lists.row_list.size(), " rows, not of ", args.rows));
  }
  if (lists.indptr.empty() || lists.indptr.front() != 0 || lists.indptr.back() != entries ||
      !std::is_sorted(lists.indptr.begin(), lists.indptr.end())) {
    return absl::InvalidArgumentError(
        absl::StrCat("indptr must ascend from 0 to the number of listed pages, ", entries));
  }
  const auto count = static_cast<int32_t>(lists.indptr.size()) - 1;
  for (const int32_t list : lists.row_list) {
    if (list < 0 || list >= count) {
      return absl::InvalidArgumentError(absl::StrCat("a row reads list ", list, " of ", count));
    }
  }
  std::vector<int32_t> last_list(args.pages.size(), -1);  // The last list that named each page.
  for (int32_t list = 0; list < count; ++list) {
    for (int32_t i = lists.indptr[list]; i < lists.indptr[list + 1]; ++i) {
      const ListedPage& entry = lists.entries[i];
      if (entry.page < 0 || entry.page >= static_cast<int64_t>(args.pages.size())) {
        return absl::InvalidArgumentError(
            absl::StrCat("list ", list, " names page ", entry.page, " of ", args.pages.size()));
      }
      if (entry.begin < 0 || entry.begin > entry.end || entry.end > kPageRows) {
        return absl::InvalidArgumentError(absl::StrCat("list ", list, " names rows [", entry.begin, ", ",
                                                       entry.end, ") of a page of ", kPageRows));
      }
      if (std::exchange(last_list[entry.page], list) == list) {
        return absl::InvalidArgumentError(absl::StrCat("list ", list, " names page ", entry.page, " twice"));
      }
    }
  }
  return absl::OkStatus();
}

// The token sinks that rows see are live.
absl::Status ValidateSinkMasks(const StepArgs& args) {
  int64_t sinks = 0;
  for (const int32_t count : args.visible_sinks) sinks = std::max<int64_t>(sinks, count);
  for (int64_t token = 0; token < sinks; ++token) {
    const uint64_t* live = args.sink_pages[PageOf(token)].live;
    if (live != nullptr && !IsLive(live, static_cast<int>(token % kPageRows))) {
      return absl::InvalidArgumentError(absl::StrCat("token sink ", token, " is not live"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateStep(const StepArgs& args) {
  const AttentionShape& shape = args.shape;
  if (shape.query_heads <= 0 || shape.kv_heads <= 0 || shape.head_dim <= 0 || shape.value_dim <= 0) {
    return absl::InvalidArgumentError("attention shape: heads and dimensions must be positive");
  }
  if (shape.query_heads % shape.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("query_heads ", shape.query_heads, " is not a multiple of kv_heads ", shape.kv_heads));
  }
  if (!std::isfinite(shape.scale) || !std::isfinite(shape.softcap) || shape.softcap < 0) {
    return absl::InvalidArgumentError(absl::StrCat("scale ", shape.scale, " and softcap ", shape.softcap,
                                                   " must be finite, softcap not negative"));
  }
  if (args.rows <= 0) return absl::InvalidArgumentError(absl::StrCat("a step of ", args.rows, " rows"));
  const size_t rows = args.rows;
  if (args.visible.size() != rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("visible has ", args.visible.size(), " ranges for ", rows, " rows"));
  }
  EDUBA_RETURN_IF_ERROR(ValidateLists(args));
  if (args.visible_sinks.size() != rows && !args.sink_pages.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("visible_sinks has ", args.visible_sinks.size(), " counts for ", rows, " rows"));
  }
  for (const int32_t sinks : args.visible_sinks) {
    if (sinks < 0 || sinks > static_cast<int64_t>(args.sink_pages.size()) * kPageRows) {
      return absl::InvalidArgumentError(absl::StrCat("a row sees ", sinks, " token sinks, but there are ",
                                                     args.sink_pages.size(), " sink pages"));
    }
  }
  EDUBA_RETURN_IF_ERROR(ValidateSinkMasks(args));
  if (!args.sink_logits.empty() && args.sink_logits.size() != static_cast<size_t>(shape.query_heads)) {
    return absl::InvalidArgumentError(absl::StrCat("sink_logits has ", args.sink_logits.size(),
                                                   " entries for ", shape.query_heads, " query heads"));
  }
  for (const float logit : args.sink_logits) {
    if (!std::isfinite(logit)) {
      return absl::InvalidArgumentError(absl::StrCat("sink logit ", logit, " is not finite"));
    }
  }
  if (args.exponents.size() != static_cast<size_t>(shape.kv_heads) * shape.value_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "exponents has ", args.exponents.size(),
        " entries, wanted kv_heads * value_dim = ", static_cast<int64_t>(shape.kv_heads) * shape.value_dim));
  }
  if (args.positions < 0 || args.positions > kMaxPositions) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", args.positions, " positions; at most ",
                                                   kMaxPositions, " are possible"));
  }
  return absl::OkStatus();
}

double PowerOfTwo(int power) { return std::bit_cast<double>(static_cast<uint64_t>(power + 1023) << 52); }

MergingStep::MergingStep(const StepArgs& args, ThreadPool& pool)
    : args_(args),
      pool_(pool),
      visible_(ClipToSequence(args)),
      seen_(args_, visible_),
      merge_kernels_(BestMergeKernels()) {
  const AttentionShape& shape = args_.shape;
  const auto row_bytes = shape.head_dim * static_cast<int64_t>(DTypeBytes(shape.key_dtype)) +
                         shape.value_dim * static_cast<int64_t>(DTypeBytes(shape.value_dtype));
  bytes_read_ = seen_.row_count() * shape.kv_heads * row_bytes;
  if (args_.sink_pages.empty()) return;
  for (const int32_t sinks : args_.visible_sinks) sink_tokens_ = std::max<int64_t>(sink_tokens_, sinks);
}

absl::Status MergingStep::ReadSinks(int64_t /*tokens*/, float* /*keys*/, float* /*values*/) {
  return absl::InternalError("a backend that has no sinks on the host was asked for them");
}

void MergingStep::ForWords(int64_t count, const std::function<void(int64_t)>& body) const {
  // Waking a thread takes as long as going through about so many words.
  constexpr int64_t kFewWords = 1 << 16;
  if (count * words_per_target() <= kFewWords) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
    pool_.ParallelFor(count, [&](int64_t i, int) { body(i); });
  }
}

int MergingStep::Exponent(int64_t kv_head, int channel) const {
  return std::clamp<int>(args_.exponents[kv_head * args_.shape.value_dim + channel], kMinExponent,
                         kMaxExponent);
}

void MergingStep::RecordFault(int64_t page, int64_t row_head) {
  const MutexLock lock(fault_mutex_);
  if (!fault_ || std::make_pair(page, row_head) < std::make_pair(fault_->page, fault_->row_head)) {
    fault_ = Fault{page, row_head};
  }
}

absl::Status MergingStep::LoadSinks() {
  if (sinks_loaded_) return absl::OkStatus();
  const AttentionShape& shape = args_.shape;
  sink_keys_.resize(sink_tokens_ * shape.kv_heads * shape.head_dim);
  sink_values_.resize(sink_tokens_ * shape.kv_heads * shape.value_dim);
  if (sink_tokens_ > 0) {
    EDUBA_RETURN_IF_ERROR(ReadSinks(sink_tokens_, sink_keys_.data(), sink_values_.data()));
  }

  const auto finite = [](float x) { return std::isfinite(x); };
  sinks_finite_ = std::all_of(sink_keys_.begin(), sink_keys_.end(), finite) &&
                  std::all_of(sink_values_.begin(), sink_values_.end(), finite);

  // [kv_heads, head_dim, tokens]: a row's dot products with some tokens wait for each other no longer than
  // one with one.
  const int64_t together = (sink_tokens_ + kSinksTogether - 1) / kSinksTogether * kSinksTogether;
  std::vector<double> keys(shape.kv_heads * shape.head_dim * together);
  for (int64_t i = 0; i < sink_tokens_ * shape.kv_heads * shape.head_dim; ++i) {
    const int64_t token = i / (shape.kv_heads * shape.head_dim);
    keys[i % (shape.kv_heads * shape.head_dim) * together + token] = sink_keys_[i];
  }

  sink_logits_.resize(row_heads() * sink_tokens_);
  reference_.assign(row_heads(), -kInfinity);
  const float* queries = args_.sink_queries != nullptr ? args_.sink_queries : args_.queries;
  pool_.ParallelFor(row_heads(), [&](int64_t row_head, int) {
    if (Cancelled()) return;
    const int row = static_cast<int>(row_head / shape.query_heads);
    const int head = static_cast<int>(row_head % shape.query_heads);
    const float* query = queries + row_head * shape.head_dim;
    double largest = args_.sink_logits.empty() ? -kInfinity : args_.sink_logits[head];
    const int64_t seen = sink_tokens_ == 0 ? 0 : args_.visible_sinks[row];
    for (int64_t first = 0; first < seen; first += kSinksTogether) {
      const double* key = keys.data() + KvHead(row_head) * shape.head_dim * together + first;
      double dots[kSinksTogether] = {};
      for (int d = 0; d < shape.head_dim; ++d, key += together) {
        for (int64_t i = 0; i < kSinksTogether; ++i) dots[i] += static_cast<double>(query[d]) * key[i];
      }
      for (int64_t token = first; token < std::min(seen, first + kSinksTogether); ++token) {
        double logit = shape.scale * dots[token - first];
        if (shape.softcap > 0) logit = shape.softcap * PortableTanh(logit / shape.softcap);
        sink_logits_[row_head * sink_tokens_ + token] = logit;
        largest = std::max(largest, logit);
      }
    }
    reference_[row_head] = largest;
  });
  sinks_loaded_ = true;
  return absl::OkStatus();
}

absl::StatusOr<const MergingStep::SumPlan*> MergingStep::SinkPlan() {
  if (!sink_plan_.targets.empty()) return &sink_plan_;
  EDUBA_RETURN_IF_ERROR(LoadSinks());
  sink_plan_.fraction_bits = kSinkPathFractionBits;
  sink_plan_.limit = kSinkPathMax;
  for (int64_t i = 0; i < row_heads(); ++i) sink_plan_.targets.push_back({i, reference_[i], KvHead(i)});
  for (int64_t head = 0; head < args_.shape.kv_heads; ++head) {
    double rounding = 0;
    for (int c = 0; c < args_.shape.value_dim; ++c) {
      const double unit = PowerOfTwo(Exponent(head, c) - kSinkPathFractionBits);
      sink_plan_.units.push_back(1 / unit);
      rounding += unit * unit;
    }
    sink_rounding_.push_back(rounding);
  }
  return &sink_plan_;
}

absl::Status MergingStep::SinkSums(absl::Span<int64_t> words) {
  EDUBA_CHECK_EQ(static_cast<int64_t>(words.size()), row_heads() * words_per_target());
  std::fill(words.begin(), words.end(), 0);
  EDUBA_ASSIGN_OR_RETURN(const SumPlan* plan, SinkPlan());
  EDUBA_RETURN_IF_ERROR(SumPages(*plan, words.data()));
  EDUBA_RETURN_IF_ERROR(CheckCancelled());
  sink_sums_ = words;
  return absl::OkStatus();
}

bool MergingStep::IsPrecise(int64_t row_head, absl::Span<const int64_t> words) const {
  const PositionRange keys = visible_[row_head / args_.shape.query_heads];
  const auto pages = static_cast<double>(PageOf(keys.end - 1) - PageOf(keys.begin) + 1);
  const int64_t head = KvHead(row_head);
  const double* units = &sink_plan_.units[head * args_.shape.value_dim];
  const double output = merge_kernels_.sum_squares(words.data(), units, args_.shape.value_dim);
  return sink_rounding_[head] * pages <= output * kRoundingShareSquared;
}

absl::StatusOr<absl::Span<const int64_t>> MergingStep::SelectForMaximum() {
  EDUBA_RETURN_IF_ERROR(LoadSinks());
  const auto sees_keys = [&](int64_t row_head) {
    return !visible_[row_head / args_.shape.query_heads].empty();
  };
  std::vector<char> fits(row_heads(), 0);
  if (!sink_sums_.empty()) {
    std::atomic<bool> fault = false;
    ForWords(row_heads(), [&](int64_t i) {
      const int64_t* words = &sink_sums_[i * words_per_target()];
      const int64_t total = words[args_.shape.value_dim];
      const int64_t flags = words[args_.shape.value_dim + 1];
      fits[i] = flags == 0 && total >= kSinkPathMin && total <= kSinkPathMax &&
                (!sees_keys(i) || IsPrecise(i, absl::MakeConstSpan(words, words_per_target())));
      if (flags >= kFaultFlag) {
        fault = true;
        fits[i] = 1;
      }
    });
    fault_somewhere_ |= fault;
  }
  std::vector<char> takes_maximum(row_heads());
  for (int64_t i = 0; i < row_heads(); ++i) takes_maximum[i] = sees_keys(i) && fits[i] == 0 ? 1 : 0;
  Select(takes_maximum);
  return absl::MakeConstSpan(selected_);
}

void MergingStep::Select(absl::Span<const char> takes_maximum) {
  paths_ = {};
  selected_.clear();
  for (int64_t i = 0; i < row_heads(); ++i) {
    if (takes_maximum[i] != 0) {
      selected_.push_back(i);
      ++paths_.maximum;
    } else {
      ++paths_.sink;
    }
  }
}

absl::Status MergingStep::TakeSelection(absl::Span<const int64_t> row_heads) {
  selected_.assign(row_heads.begin(), row_heads.end());
  paths_.maximum = static_cast<int64_t>(row_heads.size());
  paths_.sink = this->row_heads() - paths_.maximum;
  return absl::OkStatus();
}

absl::Status MergingStep::Maxima(absl::Span<float> maxima) {
  const int64_t value_dim = args_.shape.value_dim;
  EDUBA_CHECK_EQ(maxima.size(), selected_.size() * (1 + value_dim));
  std::vector<float> largest(selected_.size());
  EDUBA_RETURN_IF_ERROR(LocalMaxima(selected_, largest.data()));
  std::vector<float> magnitudes(selected_.size() * value_dim, -std::numeric_limits<float>::infinity());
  EDUBA_RETURN_IF_ERROR(RaiseMagnitudes(selected_, magnitudes.data()));
  for (size_t i = 0; i < selected_.size(); ++i) {
    float* const to = &maxima[i * (1 + value_dim)];
    *to = largest[i];
    std::copy_n(&magnitudes[i * value_dim], value_dim, to + 1);
  }
  maxima_ = maxima;
  return absl::OkStatus();
}

int MergingStep::ValueFractionBits() const {
  return 62 - static_cast<int>(
                  std::bit_width(static_cast<uint64_t>((args_.positions + kPageRows - 1) / kPageRows)));
}

absl::Status MergingStep::MaximumSums(absl::Span<int64_t> words) {
  const int64_t value_dim = args_.shape.value_dim;
  EDUBA_CHECK_EQ(static_cast<int64_t>(words.size()),
                 static_cast<int64_t>(selected_.size()) * words_per_target());
  maximum_plan_.fraction_bits = MaximumPathFractionBits(args_.positions);
  // Weights of up to exp(2^-7) can lift the total a little above `positions`; int64 has room for twice
  // as much.
  maximum_plan_.limit = (int64_t{1} << 62) + (int64_t{1} << 56);
  maximum_plan_.value_limit = 1.001 * PowerOfTwo(ValueFractionBits()) + 1;
  maximum_plan_.targets.clear();
  for (size_t i = 0; i < selected_.size(); ++i) {
    maximum_plan_.targets.push_back({selected_[i], maxima_[i * (1 + value_dim)], static_cast<int64_t>(i)});
  }
  // A page's l is 256 and a little at most, so its |o| is within 2^8 of the channel's bound, but for
  // rounding.
  std::vector<double> most;
  for (int64_t i = 0; i < args_.shape.kv_heads * value_dim; ++i) {
    most.push_back(Exponent(i / value_dim, static_cast<int>(i % value_dim)) + 9);
  }
  maximum_plan_.units.resize(selected_.size() * value_dim);
  ForWords(static_cast<int64_t>(selected_.size()), [&](int64_t i) {
    const float* maxima = &maxima_[i * (1 + value_dim)];
    merge_kernels_.maximum_units(maxima[0], maxima + 1, static_cast<int>(value_dim), ValueFractionBits(),
                                 kMinExponent, &most[KvHead(selected_[i]) * value_dim],
                                 &maximum_plan_.units[i * value_dim]);
  });
  std::fill(words.begin(), words.end(), 0);
  EDUBA_RETURN_IF_ERROR(SumPages(maximum_plan_, words.data()));
  EDUBA_RETURN_IF_ERROR(CheckCancelled());
  maximum_sums_ = words;
  return absl::OkStatus();
}

absl::Status MergingStep::CheckSums(bool sinks_finite) {
  const AttentionShape& shape = args_.shape;
  const int64_t words = words_per_target();
  const auto is_fault = [&](const int64_t* sums) { return sums[shape.value_dim + 1] != 0; };
  if (!sinks_finite) {
    return absl::InvalidArgumentError(
        absl::StrCat("a token sink's key or value is not finite: one of positions 0 to ", sink_tokens_ - 1));
  }
  for (size_t i = 0; i < selected_.size(); ++i) fault_somewhere_ |= is_fault(&maximum_sums_[i * words]);
  return fault_somewhere_ ? FaultStatus() : absl::OkStatus();
}

absl::Status MergingStep::Finish(float* outputs, float* lse, float* sink_mass) {
  EDUBA_RETURN_IF_ERROR(LoadSinks());
  EDUBA_RETURN_IF_ERROR(CheckSums(sinks_finite_));
  const AttentionShape& shape = args_.shape;
  const int64_t words = words_per_target();
  std::vector<int64_t> selected_index(row_heads(), -1);
  for (size_t i = 0; i < selected_.size(); ++i) selected_index[selected_[i]] = static_cast<int64_t>(i);
  ForWords(row_heads(), [&](int64_t i) {
    Keys keys;
    const int64_t j = selected_index[i];
    if (j >= 0 && maximum_sums_[j * words + shape.value_dim] == 0) {
      // No worker has a key that the row sees: lists and masks have taken all of them away.
    } else if (j >= 0) {
      keys.words = &maximum_sums_[j * words];
      keys.plan = &maximum_plan_;
      keys.unit_row = j;
      keys.reference = maxima_[j * (1 + shape.value_dim)];
    } else if (!sink_sums_.empty()) {
      keys.words = &sink_sums_[i * words];
      keys.plan = &sink_plan_;
      keys.unit_row = KvHead(i);
      keys.reference = reference_[i];
    }
    FinishRowHead(i, keys, outputs + i * shape.value_dim, lse + i, sink_mass + i);
  });
  return absl::OkStatus();
}

void MergingStep::FinishRowHead(int64_t row_head, const Keys& keys, float* output, float* lse,
                                float* sink_mass) const {
  const AttentionShape& shape = args_.shape;
  const int64_t row = row_head / shape.query_heads;
  const int64_t head = row_head % shape.query_heads;
  const double common = std::max(keys.reference, reference_[row_head]);
  if (common == -kInfinity) {
    std::fill_n(output, shape.value_dim, 0.0F);
    *lse = -std::numeric_limits<float>::infinity();
    *sink_mass = 0;
    return;
  }

  FinaliseCall finalise;
  finalise.count = shape.value_dim;
  double key_total = 0;
  if (keys.words != nullptr) {
    finalise.words = keys.words;
    finalise.units = &keys.plan->units[keys.unit_row * shape.value_dim];
    finalise.weight = PortableExp(keys.reference - common);
    key_total = finalise.weight *
                (static_cast<double>(keys.words[shape.value_dim]) * PowerOfTwo(-keys.plan->fraction_bits));
  }
  double sinks = args_.sink_logits.empty() ? 0 : PortableExp(args_.sink_logits[head] - common);
  absl::InlinedVector<double, 16> weights(sink_tokens_ == 0 ? 0 : args_.visible_sinks[row]);
  for (size_t token = 0; token < weights.size(); ++token) {
    weights[token] = PortableExp(sink_logits_[row_head * sink_tokens_ + token] - common);
    sinks += weights[token];
  }
  finalise.sinks = static_cast<int>(weights.size());
  finalise.sink_weights = weights.data();
  finalise.sink_values = sink_values_.data() + KvHead(row_head) * shape.value_dim;
  finalise.sink_stride = int64_t{shape.kv_heads} * shape.value_dim;
  finalise.total = key_total + sinks;
  finalise.out = output;
  merge_kernels_.finalise(finalise);
  *lse = static_cast<float>(common + PortableLog(finalise.total));
  *sink_mass = static_cast<float>(sinks / finalise.total);
}

absl::Status MergingStep::CheckCancelled() const {
  return Cancelled() ? absl::CancelledError("the step was called off") : absl::OkStatus();
}

absl::Status MergingStep::FaultStatus() const {
  if (!fault_) {
    return absl::InvalidArgumentError(
        "a logit, weight or value is not finite on another worker of the group; its message names the page");
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "a logit, weight or value is not finite, or beyond its channel's exponent: query row ",
      args_.first_row + fault_->row_head / args_.shape.query_heads, ", head ",
      fault_->row_head % args_.shape.query_heads, ", page ", fault_->page, " (positions ",
      PageBegin(fault_->page), " to ", PageBegin(fault_->page + 1) - 1,
      "); scale the query, the session's keys or its scale down until every logit is below 3e38"));
}

}  // namespace eduba
