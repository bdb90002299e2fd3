#include "collective/nccl/gpu_stream.h"

namespace eduba {

absl::StatusOr<std::unique_ptr<GpuStream>> OpenCudaStream(int /*device*/) {
  return absl::FailedPreconditionError(
      "this program was built without CUDA; build it with nvcc 12.4 or newer (cmake -DEDUBA_CUDA=ON says "
      "what is missing)");
}

}  // namespace eduba
