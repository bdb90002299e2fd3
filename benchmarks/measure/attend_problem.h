#ifndef EDUBA_BENCHMARKS_MEASURE_ATTEND_PROBLEM_H_
#define EDUBA_BENCHMARKS_MEASURE_ATTEND_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "kernels/backend.h"
#include "kernels/page_lists.h"

// What the benchmarks of all backends measure.
namespace eduba {

// A step on one rank, from StartStep to the answer, with nobody to sum with.
inline absl::Status AttendOnce(Backend& backend, const StepArgs& args, std::vector<float>& outputs) {
  EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<AttentionStep> step, backend.StartStep(args));
  std::vector<int64_t> sink_words;
  EDUBA_RETURN_IF_ERROR(step->Attend());
  if (QueuedStep* const queued = step->queued(); args.has_sinks() && queued != nullptr) {
    EDUBA_RETURN_IF_ERROR(queued->QueueSums(nullptr));
    EDUBA_RETURN_IF_ERROR(queued->QueueFinalise());
  } else if (args.has_sinks()) {
    sink_words.resize(args.row_heads() * args.words_per_row_head());
    EDUBA_RETURN_IF_ERROR(step->SinkSums(absl::MakeSpan(sink_words)));
  }
  EDUBA_ASSIGN_OR_RETURN(const auto selected, step->SelectForMaximum());
  std::vector<float> maxima(selected.size() * args.maxima_per_row_head());
  std::vector<int64_t> maximum_words(selected.size() * args.words_per_row_head());
  if (!selected.empty()) {
    EDUBA_RETURN_IF_ERROR(step->Maxima(absl::MakeSpan(maxima)));
    EDUBA_RETURN_IF_ERROR(step->MaximumSums(absl::MakeSpan(maximum_words)));
  }
  const size_t row_heads = static_cast<size_t>(args.rows) * args.shape.query_heads;
  outputs.resize(row_heads * args.shape.value_dim);
  std::vector<float> lse(row_heads);
  std::vector<float> sink_mass(row_heads);
  return step->Finish(outputs.data(), lse.data(), sink_mass.data());
}

// Pages full of one random page's numbers, and queries against them, which see all keys. With `is_causal`
// they are at the last positions, and see what is before them; with a window, the last `window` of it. With
// `has_16_bit_queries` queries are rounded as keys are.
class AttendProblem {
 public:
  AttendProblem(Backend& backend, const AttentionShape& shape, int rows, int64_t pages, char* memory,
                ThreadPool& pool, bool is_causal = false, int64_t window = 0, bool has_16_bit_queries = false)
      : visible_(rows, {0, pages * kPageRows}),
        // The sink weighs about as much as all keys, so that the sums take the sink path.
        sink_logits_(shape.query_heads, std::log(static_cast<float>(pages * kPageRows))) {
    for (int row = 0; is_causal && row < rows; ++row) {
      visible_[row].end = pages * kPageRows - rows + row + 1;
      if (window > 0) visible_[row].begin = std::max<int64_t>(0, visible_[row].end - window);
    }
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    queries_.resize(static_cast<size_t>(rows) * shape.query_heads * shape.head_dim);
    for (float& x : queries_) {
      x = normal(random);
      if (has_16_bit_queries) x = RoundedTo(shape.key_dtype, x);
    }
    const auto stored = [&](DType dtype, int64_t count, int16_t* exponent) {
      std::vector<char> bytes(count * DTypeBytes(dtype));
      for (int64_t i = 0; i < count; ++i) {
        StoreElement(bytes.data(), dtype, i, std::clamp(normal(random), -4.0F, 4.0F));
      }
      *exponent = 2;
      return bytes;
    };
    int16_t exponent = 0;
    const std::vector<char> keys =
        stored(shape.key_dtype, int64_t{kPageRows} * shape.kv_heads * shape.head_dim, &exponent);
    const std::vector<char> values =
        stored(shape.value_dtype, int64_t{kPageRows} * shape.kv_heads * shape.value_dim, &exponent);
    exponents_.assign(static_cast<size_t>(shape.kv_heads) * shape.value_dim, exponent);
    pool.ParallelFor(pages, [&](int64_t p, int) {
      backend
          .WriteRows(shape, memory + p * backend.PageBytes(shape), 0, kPageRows, keys.data(), values.data())
          .IgnoreError();
    });
    for (int64_t p = 0; p < pages; ++p) refs_.push_back({memory + p * backend.PageBytes(shape), p});
    args_.shape = shape;
    args_.rows = rows;
    args_.queries = queries_.data();
    args_.visible = visible_;
    args_.pages = refs_;
    lists_ = OwnedPageLists(pages, rows);
    args_.lists = lists_.view();
    args_.sink_logits = sink_logits_;
    args_.exponents = exponents_;
    args_.positions = pages * kPageRows;
  }
  const StepArgs& args() const { return args_; }
  // Pages that some row sees. REQUIRES: causal rows, or rows that see all.
  int64_t seen_pages() const {
    return static_cast<int64_t>(refs_.size()) - visible_.front().begin / kPageRows;
  }
  // Pairs of a row and a key that it sees.
  double pairs() const {
    double count = 0;
    for (const PositionRange& range : visible_) count += static_cast<double>(range.size());
    return count;
  }

 private:
  static float RoundedTo(DType dtype, float x) {
    if (dtype == DType::kF32) return x;
    return dtype == DType::kBf16 ? F32FromBf16(Bf16FromF32(x)) : F32FromF16(F16FromF32(x));
  }

  std::vector<float> queries_;
  std::vector<PositionRange> visible_;
  std::vector<float> sink_logits_;
  std::vector<int16_t> exponents_;
  std::vector<PageRef> refs_;
  OwnedPageLists lists_;
  StepArgs args_;
};

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_ATTEND_PROBLEM_H_
