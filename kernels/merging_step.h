#ifndef EDUBA_KERNELS_MERGING_STEP_H_
#define EDUBA_KERNELS_MERGING_STEP_H_

#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "base/parallel.h"
#include "kernels/backend.h"
#include "kernels/merge_kernels.h"
#include "kernels/seen_pages.h"

namespace eduba {

// INVALID_ARGUMENT naming the first thing in `args` that contradicts backend.h.
absl::Status ValidateStep(const StepArgs& args);

// 2^power, exact, for the powers that value exponents and fraction bits can make.
double PowerOfTwo(int power);

// The square of what the sums' rounding may be of a row's output on the sink path, both as norms
// (docs/numerics.md section 4).
inline constexpr double kRoundingShareSquared = 0x1p-44;

// At least ln(|o| exp(m)), by less than ln 2 and fp32's rounding: what a page's o[c] may reach relative to
// any reference. -inf for 0.
inline float LogMagnitude(float m, float o) {
  // 2^k is above |o|: from its exponent bits, for which a subnormal counts as the smallest normal number.
  const auto k = static_cast<int>(std::bit_cast<uint32_t>(o) >> 23 & 0xff) - 126;
  return o == 0 ? -std::numeric_limits<float>::infinity() : m + static_cast<float>(k) * 0.693147181F;
}

// The half of a step that is the same in every backend that computes on the host: sinks, the choice of path,
// and the finalise, in double. A backend derives from it and brings the pages (its partials). One that does
// these three on a device overrides SinkSums, SelectForMaximum and Finish, and leaves the rest to it.
class MergingStep : public AttentionStep {
 public:
  // A row and head whose pages are to be summed with weights exp(m - reference).
  struct Target {
    int64_t row_head = 0;  // row * query_heads + head
    double reference = 0;
    int64_t unit_row = 0;  // Into SumPlan::units.
  };
  // All sums of one path.
  struct SumPlan {
    std::vector<Target> targets;
    int fraction_bits = 0;  // The fraction bits of L.
    int64_t limit = 0;      // The largest L that a rank may contribute.
    // The largest word of O that one page can make where the units come from what the pages hold. 0: the
    // units come from the session's exponents, so |O[c]| <= L.
    double value_limit = 0;
    // [unit rows, value_dim], powers of two: O[c] = rint(o[c] exp(m - reference) units[c])
    std::vector<double> units;
  };

  absl::Status SinkSums(absl::Span<int64_t> words) override;
  absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() override;
  absl::Status TakeSelection(absl::Span<const int64_t> row_heads) final;
  absl::Status Maxima(absl::Span<float> maxima) final;
  absl::Status MaximumSums(absl::Span<int64_t> words) final;
  absl::Status Finish(float* outputs, float* lse, float* sink_mass) override;
  PathCounts paths() const final { return paths_; }
  int64_t bytes_read() const final { return bytes_read_; }

 protected:
  // REQUIRES: ValidateStep(args) is OK. `pool` outlives the step.
  MergingStep(const StepArgs& args, ThreadPool& pool);

  // The sums of the sink path: every row and head, M for reference.
  absl::StatusOr<const SumPlan*> SinkPlan();

  // The first `tokens` stored rows of the sink pages, in f32: keys [tokens, kv_heads, head_dim], values
  // [tokens, kv_heads, value_dim]. Not asked for where the three calls above are overridden.
  virtual absl::Status ReadSinks(int64_t tokens, float* keys, float* values);
  // maxima[i] = the largest visible logit of row_heads[i] over this worker's pages; -inf without one, +inf
  // after a fault.
  virtual absl::Status LocalMaxima(absl::Span<const int64_t> row_heads, float* maxima) = 0;
  // For each of `row_heads`, raises magnitudes [row_heads, value_dim] to LogMagnitude(m, o[c]) of its
  // partials.
  virtual absl::Status RaiseMagnitudes(absl::Span<const int64_t> row_heads, float* magnitudes) = 0;
  // Adds to words [targets, value_dim + 2], zeroed by the caller, what backend.h says under SinkSums.
  virtual absl::Status SumPages(const SumPlan& plan, int64_t* words) = 0;

  // ReadSinks for a backend whose pages are host memory: calls read(page, row, kv_head, key, value) for each.
  template <class Read>
  void ReadSinksWith(int64_t tokens, float* keys, float* values, const Read& read) const {
    const AttentionShape& shape = args_.shape;
    for (int64_t i = 0; i < tokens * shape.kv_heads; ++i) {
      const int64_t token = i / shape.kv_heads;
      read(args_.sink_pages[PageOf(token)].data, static_cast<int>(token % kPageRows),
           static_cast<int>(i % shape.kv_heads), keys + i * shape.head_dim, values + i * shape.value_dim);
    }
  }

  // Remembers the fault of the lowest page (then row, then head), for the message. Thread-safe.
  void RecordFault(int64_t page, int64_t row_head);

  bool Cancelled() const {
    return args_.cancelled != nullptr && args_.cancelled->load(std::memory_order_relaxed);
  }
  absl::Status CheckCancelled() const;

  // body(i) for each i below `count`, on several threads where there are many words to go through: those of
  // one row and head each.
  void ForWords(int64_t count, const std::function<void(int64_t i)>& body) const;

  int64_t row_heads() const { return args_.row_heads(); }
  int64_t words_per_target() const { return args_.words_per_row_head(); }
  // The exponent of a channel in the sink path's units.
  int Exponent(int64_t kv_head, int channel) const;
  // Says of every row and head whether it takes the maximum path.
  void Select(absl::Span<const char> takes_maximum);
  // What Finish answers before there is anything to finalise, if that is an error. `sinks_finite`: all token
  // sinks' keys and values that some row sees are.
  absl::Status CheckSums(bool sinks_finite);

  const StepArgs args_;
  ThreadPool& pool_;
  const std::vector<PositionRange> visible_;  // args_.visible without positions that do not exist.
  const SeenPages seen_;
  int64_t sink_tokens_ = 0;           // Token sinks that some row sees.
  bool fault_somewhere_ = false;      // Some rank met one.
  std::vector<int64_t> selected_;     // row_heads on the maximum path, ascending
  absl::Span<int64_t> maximum_sums_;  // [selected, words], the caller's; empty before MaximumSums

 private:
  struct Fault {
    int64_t page;
    int64_t row_head;
  };
  // What came of the keys of one row and head.
  struct Keys {
    const int64_t* words = nullptr;  // [words_per_target()], or none
    const SumPlan* plan = nullptr;   // The plan of the words' path.
    int64_t unit_row = 0;
    double reference = -std::numeric_limits<double>::infinity();
  };

  absl::Status LoadSinks();
  int64_t KvHead(int64_t row_head) const {
    return row_head % args_.shape.query_heads / args_.shape.gqa_group();
  }
  // Whether the sums' rounding is too small to be seen in the row's output.
  bool IsPrecise(int64_t row_head, absl::Span<const int64_t> words) const;
  // Fraction bits of O on the maximum path.
  int ValueFractionBits() const;
  void FinishRowHead(int64_t row_head, const Keys& keys, float* output, float* lse, float* sink_mass) const;
  absl::Status FaultStatus() const;

  const MergeKernels& merge_kernels_;
  std::vector<float> sink_keys_;       // [sink tokens, kv_heads, head_dim]
  std::vector<float> sink_values_;     // [sink tokens, kv_heads, value_dim]
  std::vector<double> sink_logits_;    // [row_heads, sink tokens]
  std::vector<double> reference_;      // [row_heads]: M; -inf without a sink
  SumPlan sink_plan_;                  // Empty before SinkPlan.
  std::vector<double> sink_rounding_;  // [kv_heads]: the sum of its channels' squared units.
  bool sinks_loaded_ = false;
  bool sinks_finite_ = true;

  SumPlan maximum_plan_;
  // The caller's memory, empty before the call that fills it.
  absl::Span<int64_t> sink_sums_;  // [row_heads, words]
  absl::Span<float> maxima_;       // [selected, 1 + value_dim]
  PathCounts paths_;
  int64_t bytes_read_ = 0;

  Mutex fault_mutex_;
  std::optional<Fault> fault_ ABSL_GUARDED_BY(fault_mutex_);
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_MERGING_STEP_H_
