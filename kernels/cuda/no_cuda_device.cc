#include "kernels/cuda/cuda_device.h"

namespace eduba::cuda {
namespace {

absl::Status NotBuilt() {
  return absl::FailedPreconditionError(
      "this program was built without CUDA; build it with nvcc 12.4 or newer (cmake -DEDUBA_CUDA=ON says "
      "what "
      "is missing), or use --device cpu");
}

}  // namespace

absl::StatusOr<CudaMachine> DescribeCuda() { return NotBuilt(); }
absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(int /*index*/) { return NotBuilt(); }
absl::StatusOr<int64_t> FreeCudaBytes(int /*index*/) { return NotBuilt(); }

}  // namespace eduba::cuda
