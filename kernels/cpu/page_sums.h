#ifndef EDUBA_KERNELS_CPU_PAGE_SUMS_H_
#define EDUBA_KERNELS_CPU_PAGE_SUMS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cpu/page_kernels.h"
#include "kernels/merging_step.h"

namespace eduba {

// The integer sums of pages' partials (docs/numerics.md section 3) of one path of one step, as threads make
// them: each thread sums what it meets, and integer sums do not mind who met what.
class PageSums {
 public:
  // Adds to words [targets, value_dim + 2], zeros at first: AttentionStep::SinkSums says what is in them.
  // `kernels`, `plan` and `words` outlive the sums.
  PageSums(const PageKernels& kernels, int threads, int64_t row_heads, const MergingStep::SumPlan& plan,
           int64_t value_dim, int64_t value_pitch, int64_t* words);

  // A thread sums some pages' partials of some rows and heads by itself: Begin, any Adds, End. Different
  // threads may call at once, each with its own number, but not End for the same rows.
  void Begin(int thread, absl::Span<const int64_t> row_heads);
  // One page's partial (m, l, o [value_pitch]) of row_heads[query]; nothing where it is no target. False when
  // a value is beyond its channel's exponent, which is a fault.
  bool Add(int thread, int64_t query, float m, float l, const float* o);
  void End(int thread);

 private:
  struct Own {
    std::vector<int32_t> targets;  // [queries]: indexes of targets, or -1.
    std::vector<int64_t> sums;     // [queries, stride]
  };

  const PageKernels& kernels_;
  const MergingStep::SumPlan& plan_;
  const double one_;  // 2^(fraction bits of L)
  const int64_t value_dim_;
  const int64_t pitch_;
  const int64_t stride_;              // Words of one query: O [pitch], L, flag.
  std::vector<double> padded_units_;  // [unit rows, pitch]; the padding's values are zeros, in any unit.
  const double* units_;               // These, or the plan's where they need no padding.
  std::vector<int32_t> target_of_;    // [row_heads]: index into the targets, or -1.
  std::vector<Own> own_;              // [threads]
  int64_t* const words_;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_PAGE_SUMS_H_
