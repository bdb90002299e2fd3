#ifndef EDUBA_BENCHMARKS_MEASURE_CUDA_ATTEND_H_
#define EDUBA_BENCHMARKS_MEASURE_CUDA_ATTEND_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "benchmarks/measure/attend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

namespace eduba {

// One step of attention on cuda:`device` from StartStep to Finish, host and copies included, beside copies
// within the device of as many bytes, between the rounds: stream_gb_per_s counts what a copy reads and
// writes. head_dim 128, 8 KV heads, bf16: 1, 4 and 8 query heads per KV head with one query row over 8Ki,
// 64Ki, 1Mi and 4Mi keys, as far as options.bytes goes; then 64 rows over 64Ki keys, and the last 2048 rows
// of a prefill of 32Ki, causal, without and with a window of 4096. Batches stand beside the device's rate of
// bf16 products, in operations that the definition needs (the tensor path does twice as many). Each shape is
// checked against the reference first: INTERNAL when they differ. Other errors as MakeCudaBackend.
absl::StatusOr<std::vector<AttendResult>> RunCudaAttendBench(int device, CudaPrecision precision,
                                                             const BenchOptions& options);

// The same over two views of any device: the backend's, and the copies'.
absl::StatusOr<std::vector<AttendResult>> RunCudaAttendBenchOn(std::unique_ptr<cuda::Device> device,
                                                               std::unique_ptr<cuda::Device> copies,
                                                               CudaPrecision precision,
                                                               const BenchOptions& options);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_CUDA_ATTEND_H_
