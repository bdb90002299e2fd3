#ifndef EDUBA_KERNELS_LAYER_FINGERPRINT_H_
#define EDUBA_KERNELS_LAYER_FINGERPRINT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/layer_kernels.h"

namespace eduba {

// A hash of every bit that `kernels` compute for some small fixed problems: products of all types, norms,
// rotary positions far out, activations; and of their library(). Workers of one group must agree on it, as on
// Fingerprint of their attention. Takes a few milliseconds.
//
// INTERNAL when a row's bits depend on the batch it is in: such kernels must not serve.
absl::StatusOr<uint64_t> LayerFingerprint(LayerKernels& kernels);

}  // namespace eduba

#endif  // EDUBA_KERNELS_LAYER_FINGERPRINT_H_
