#ifndef EDUBA_KERNELS_CUDA_MATRIX_RATE_H_
#define EDUBA_KERNELS_CUDA_MATRIX_RATE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"

namespace eduba::cuda {

// How fast a device multiplies bf16 matrices: the ceiling of a prefill. By cuBLAS, square products of 8192,
// where libcublas is found at run time; else by a loop of mma.sync without memory, which newer chips than
// sm_80 can exceed with instructions of their own (wgmma).
class MatrixRate {
 public:
  // `device` outlives it. RESOURCE_EXHAUSTED without memory for the matrices.
  static absl::StatusOr<std::unique_ptr<MatrixRate>> Make(Device& device);
  virtual ~MatrixRate() = default;

  // "cuBLAS" or "mma.sync".
  virtual std::string name() const = 0;
  // 10^9 operations a second, over some milliseconds.
  virtual absl::StatusOr<double> Measure() = 0;
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_MATRIX_RATE_H_
