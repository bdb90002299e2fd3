#ifndef EDUBA_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
#define EDUBA_KERNELS_REFERENCE_REFERENCE_BACKEND_H_

#include <memory>

#include "kernels/backend.h"

namespace eduba {

// One thread, double, plain loops: slow, and short enough to check by reading. Its pages are row-major, keys
// then values.
std::unique_ptr<Backend> MakeReferenceBackend();

}  // namespace eduba

#endif  // EDUBA_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
