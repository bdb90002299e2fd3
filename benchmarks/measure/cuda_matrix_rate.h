#ifndef EDUBA_BENCHMARKS_MEASURE_CUDA_MATRIX_RATE_H_
#define EDUBA_BENCHMARKS_MEASURE_CUDA_MATRIX_RATE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"

namespace eduba::cuda {

// How fast a device multiplies bf16 matrices: the ceiling of a prefill. By cuBLAS, square products of 8192 of
// random numbers, where libcublas is found at run time; else by a loop of mma.sync without memory, which
// newer chips than sm_80 can exceed with instructions of their own (wgmma).
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

// Fills `bytes` (even) of the device's memory with bf16 numbers of a normal distribution, the same in every
// call, and waits for it. REQUIRES: Attach. Rates must not be measured over zeros: they switch few
// transistors, and the chip clocks higher than over anything that a session holds.
absl::Status FillNormalBf16(Device& device, Stream stream, char* data, int64_t bytes);

}  // namespace eduba::cuda

#endif  // EDUBA_BENCHMARKS_MEASURE_CUDA_MATRIX_RATE_H_
