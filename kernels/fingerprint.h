#ifndef EDUBA_KERNELS_FINGERPRINT_H_
#define EDUBA_KERNELS_FINGERPRINT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace eduba {

// A hash of every bit (integer sums, outputs, lse, sink mass) that `backend` computes for some small fixed
// problems: all dtypes, both paths, grouped heads, softcap, sinks. Workers whose fingerprints differ would
// not add up to the same answer on every placement, so they must not be in one group. Takes a few
// milliseconds; uses the backend like any step.
//
// INTERNAL when a row's bits depend on the batch it is in: such a backend must not serve.
absl::StatusOr<uint64_t> Fingerprint(Backend& backend);

}  // namespace eduba

#endif  // EDUBA_KERNELS_FINGERPRINT_H_
