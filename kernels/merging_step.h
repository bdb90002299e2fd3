#ifndef EDUBA_KERNELS_MERGING_STEP_H_
#define EDUBA_KERNELS_MERGING_STEP_H_

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/parallel.h"
#include "kernels/backend.h"

namespace eduba {

// INVALID_ARGUMENT naming the first thing in `args` that contradicts backend.h.
absl::Status ValidateStep(const StepArgs& args);

// The rows of page `page` that a row with `visible` sees, as local rows.
PositionRange RowsInPage(PositionRange visible, int64_t page);

// 2^power, exact, for the powers that value exponents and fraction bits can make.
double PowerOfTwo(int power);

// The half of a step that is the same in every backend that computes on the host: sinks, the choice of path,
// and the fold, in double. A backend derives from it and brings the pages (its partials).
class MergingStep : public AttentionStep {
 public:
  // A row and head whose pages are to be summed with weights exp(m - reference).
  struct Target {
    int64_t row_head = 0;  // row * query_heads + head
    double reference = 0;
  };
  // The integer unit, and the largest sum of l in it that a rank may contribute.
  struct Quantum {
    int fraction_bits = 0;
    int64_t limit = 0;
    bool operator==(const Quantum&) const = default;
  };

  absl::StatusOr<absl::Span<int64_t>> SinkSums() final;
  absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() final;
  absl::StatusOr<absl::Span<float>> Maxima() final;
  absl::StatusOr<absl::Span<int64_t>> MaximumSums() final;
  absl::Status Finish(float* outputs, float* lse, float* sink_mass) final;
  PathCounts paths() const final { return paths_; }
  int64_t bytes_read() const final { return bytes_read_; }

 protected:
  static constexpr Quantum kSinkPathQuantum = {kSinkPathFractionBits, kSinkPathMax};

  // REQUIRES: ValidateStep(args) is OK. `pool` outlives the step.
  MergingStep(const StepArgs& args, ThreadPool& pool);

  // The stored row in f32.
  virtual void ReadRow(const void* page, int row, int kv_head, float* key, float* value) const = 0;
  // Largest visible logit of the row and head over this worker's pages; -inf without one, +inf after a fault.
  virtual float LocalMaximum(int64_t row_head) const = 0;
  // Whether there may be a sink path at all, and its targets: every row and head, with M for reference.
  bool HasSinks() const { return !args_.sink_logits.empty() || !args_.sink_pages.empty(); }
  std::vector<Target> SinkTargets();

  // Adds to words [targets, value_dim + 2], zeroed by the caller, what backend.h says under SinkSums.
  virtual void SumPages(absl::Span<const Target> targets, Quantum quantum, int64_t* words) = 0;

  // Remembers the fault of the lowest page (then row, then head), for the message. Thread-safe.
  void RecordFault(int64_t page, int64_t row_head);

  int64_t row_heads() const { return int64_t{args_.rows} * args_.shape.query_heads; }
  int64_t words_per_target() const { return args_.shape.value_dim + 2; }
  // 2^(fraction_bits - e[c]) for the value channels of all KV heads: [kv_heads, value_dim].
  std::vector<double> Units(int fraction_bits) const;

  const StepArgs args_;
  ThreadPool& pool_;
  const std::vector<PositionRange> visible_;  // args_.visible without positions that do not exist.

 private:
  struct Fault {
    int64_t page;
    int64_t row_head;
  };

  void LoadSinks();
  int64_t CountBytes() const;
  void FinishRowHead(int64_t row_head, absl::Span<const int64_t> words, double reference, int fraction_bits,
                     float* output, float* lse, float* sink_mass) const;
  absl::Status FaultStatus() const;

  int64_t sink_tokens_ = 0;          // Most that any row sees.
  std::vector<float> sink_keys_;     // [sink tokens, kv_heads, head_dim]
  std::vector<float> sink_values_;   // [sink tokens, kv_heads, value_dim]
  std::vector<double> sink_logits_;  // [row_heads, sink tokens]
  std::vector<double> reference_;    // [row_heads]: M; -inf without a sink
  bool sinks_loaded_ = false;
  bool sinks_finite_ = true;
  bool has_sink_sums_ = false;
  bool fault_somewhere_ = false;

  std::vector<int64_t> sink_sums_;     // [row_heads, words]
  std::vector<int64_t> selected_;      // row_heads on the maximum path, ascending
  std::vector<float> maxima_;          // [selected]
  std::vector<int64_t> maximum_sums_;  // [selected, words]
  PathCounts paths_;
  int64_t bytes_read_ = 0;

  std::mutex fault_mutex_;
  std::optional<Fault> fault_;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_MERGING_STEP_H_
