#ifndef EDUBA_KERNELS_CPU_PAGE_SUMS_H_
#define EDUBA_KERNELS_CPU_PAGE_SUMS_H_

#include <cstdint>
#include <vector>

#include "kernels/cpu/page_kernels.h"
#include "kernels/merging_step.h"

namespace eduba {

// The integer sums of pages' partials (docs/numerics.md section 3) of one path of one step, as threads make
// them: each thread sums what it meets, and integer sums do not mind who met what.
class PageSums {
 public:
  // `kernels` outlives the sums.
  PageSums(const PageKernels& kernels, int threads, int64_t row_heads, const MergingStep::SumPlan& plan,
           int64_t value_dim, int64_t value_pitch);

  // Adds one page's partial (m, l, o [value_pitch]) of a row and head; nothing where it is no target. False
  // when a value is beyond its channel's exponent, which is a fault. Different threads may
  // call at once, each with its own number.
  bool Add(int thread, int64_t row_head, float m, float l, const float* o);

  // Adds all threads' sums to words [targets, value_dim + 2], and sets the flags: AttentionStep::SinkSums
  // says what is in them.
  void Collect(int64_t* words) const;

 private:
  const PageKernels& kernels_;
  const std::vector<MergingStep::Target> targets_;
  const int64_t limit_;
  const double one_;          // 2^(fraction bits of L)
  const double value_limit_;  // SumPlan::value_limit
  const int64_t value_dim_;
  const int64_t pitch_;
  const int64_t stride_;            // Words of one target: O [pitch], L, flag.
  std::vector<double> units_;       // [unit rows, pitch]; the padding's values are zeros, in any unit.
  std::vector<int32_t> target_of_;  // [row_heads]: index into targets_, or -1.
  std::vector<std::vector<int64_t>> sums_;  // [threads] of nothing yet, or [targets, stride].
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_PAGE_SUMS_H_
