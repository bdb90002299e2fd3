#ifndef EDUBA_KERNELS_CUDA_CUDA_BACKEND_H_
#define EDUBA_KERNELS_CUDA_CUDA_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace eduba {

// How attention over keys and values of 16 bits is computed; over f32 it is always exact. All workers of a
// group compute alike: their fingerprints tell. A row's bits depend on neither its batch nor its neighbours
// either way.
enum class CudaPrecision : uint8_t {
  kExact,   // fp32, to the bits of a CPU: errors within 3e-6.
  kTensor,  // On tensor cores, queries and weights in two 16-bit terms: errors within 3e-4, on sm_90a 6e-4
            // for f16, whose weights are one term there (docs/numerics.md 2.1).
};
// "exact" and "tensor". INVALID_ARGUMENT for anything else.
absl::StatusOr<CudaPrecision> ParseCudaPrecision(const std::string& name);

struct CudaOptions {
  CudaPrecision precision = CudaPrecision::kExact;
  // Device memory for pages, taken at the start; slabs are cut from it, and nothing is allocated for them
  // later.
  int64_t page_bytes = 0;
  // Device memory for the partials of a step, taken at the start too. A step whose partials take more goes
  // through its pages in parts, and where it needs them twice computes them twice, to the same bits.
  int64_t partial_bytes = int64_t{512} << 20;
  int threads = 1;  // The host's threads, for sinks and for finalising.
};

// A device for each "cuda" (cuda:0) or "cuda:N". INVALID_ARGUMENT for anything else; -1 for "cpu".
absl::StatusOr<int> CudaDeviceIndex(const std::string& name);

// The GPU's kernels on cuda:`device`; errors as OpenCudaDevice (cuda_device.h), and RESOURCE_EXHAUSTED when
// the device has not as much memory left as the options want.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device, const CudaOptions& options);
// The same over any device, which others may use beside it.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackendOn(std::shared_ptr<cuda::Device> device,
                                                           const CudaOptions& options);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CUDA_CUDA_BACKEND_H_
