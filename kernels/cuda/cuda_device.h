#ifndef EDUBA_KERNELS_CUDA_CUDA_DEVICE_H_
#define EDUBA_KERNELS_CUDA_CUDA_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"

namespace eduba::cuda {

// What this machine has, for `eduba doctor`.
struct CudaMachine {
  struct Gpu {
    std::string name;  // "NVIDIA H100 80GB HBM3"
    int major = 0;     // Compute capability.
    int minor = 0;
    int64_t memory_bytes = 0;
  };
  std::string driver;   // Newest CUDA that the driver serves: "13.0"
  std::string runtime;  // The runtime that this program was built with.
  std::vector<Gpu> gpus;
};

// FAILED_PRECONDITION, in one line, where the program was built without CUDA, there is no driver, the driver
// is older than the program needs, or there is no device.
absl::StatusOr<CudaMachine> DescribeCuda();

// Device number `index`, as CUDA counts them. FAILED_PRECONDITION as above, or where there is no such device,
// or it is older than sm_80; RESOURCE_EXHAUSTED where others have taken all its memory.
absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(int index);

// Free bytes of the device's memory.
absl::StatusOr<int64_t> FreeCudaBytes(int index);

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_CUDA_DEVICE_H_
