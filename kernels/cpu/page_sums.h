#ifndef EDUBA_KERNELS_CPU_PAGE_SUMS_H_
#define EDUBA_KERNELS_CPU_PAGE_SUMS_H_

#include <algorithm>
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
  // One page's partials (m, l, o [value_pitch] of each) of row_heads from `first` on, `count` of them;
  // nothing where one is no target. Calls fault(i) where a value of the i-th is beyond its channel's
  // exponent.
  template <class Fault>
  void Add(int thread, int64_t first, int64_t count, const float* m, const float* l, const float* o,
           const Fault& fault) {
    double weights[kMaxPageQueries];
    for (int64_t done = 0; done < count; done += kMaxPageQueries) {
      const int64_t some = std::min<int64_t>(count - done, kMaxPageQueries);
      Weigh(thread, first + done, some, m + done, weights);
      for (int64_t i = done; i < done + some; ++i) {
        if (!AddOne(thread, first + i, m[i], l[i], o + i * pitch_, weights[i - done])) fault(i);
      }
    }
  }
  void End(int thread);

 private:
  struct Own {
    std::vector<int32_t> targets;  // [queries]: indexes of targets, or -1.
    std::vector<int64_t> sums;     // [queries, stride]
  };

  // exp(m - reference) of some targets; of what is no target, any number.
  void Weigh(int thread, int64_t first, int64_t count, const float* m, double* weights) const;
  // False for a fault.
  bool AddOne(int thread, int64_t query, float m, float l, const float* o, double weight);

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
