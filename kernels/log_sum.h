#ifndef EDUBA_KERNELS_LOG_SUM_H_
#define EDUBA_KERNELS_LOG_SUM_H_

#include "absl/types/span.h"

namespace eduba {

// ln(sum exp(x)), within 1e-6 of it, for one row of logits; NaN where one is NaN. One thread; a function of
// the row alone. REQUIRES: not empty.
double LogSumExp(absl::Span<const float> x);

}  // namespace eduba

#endif  // EDUBA_KERNELS_LOG_SUM_H_
