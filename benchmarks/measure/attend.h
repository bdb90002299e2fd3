#ifndef EDUBA_BENCHMARKS_MEASURE_ATTEND_H_
#define EDUBA_BENCHMARKS_MEASURE_ATTEND_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "benchmarks/measure/matrix_rates.h"
#include "benchmarks/measure/stream.h"

namespace eduba {

// Attention against ceilings measured in the same run, on the same memory. Rounds of kernel and ceiling
// alternate, and medians are compared, so that a neighbour's load falls on both.

// One step of attention, from StartStep to Finish.
struct AttendResult {
  std::string backend;  // "cpu/AVX2"
  int threads = 0;
  int head_dim = 0;  // Elements of a key and of a value.
  int kv_heads = 0;
  int queries_per_kv_head = 0;
  int query_rows = 0;
  double keys = 0;  // The keys that a row sees, on average.
  DType dtype = DType::kBf16;
  int64_t bytes = 0;   // The bytes of keys and values, each counted once.
  double seconds = 0;  // Median of the rounds.
  double spread = 0;   // (slowest - fastest) / median
  double gb_per_s = 0;
  double stream_gb_per_s = 0;  // Measured between the rounds.
  double share = 0;            // gb_per_s / stream_gb_per_s
  // On a GPU: how long it was busy with keys and values, without the copies, sinks and waits of the step.
  double kernel_seconds = 0;
  double kernel_share = 0;
  double kernel_matrix_share = 0;
  bool has_16_bit_queries = false;  // They are numbers of `dtype`.
  // Batches only (0 and empty otherwise): 2 (head_dim + value_dim) operations per query vector and key,
  // beside the rate of a large matrix product on this machine. The ceiling is the faster of bf16 and f32:
  // chips without bf16 do it slowly.
  double gflops = 0;
  double matrix_gflops = 0;
  double matrix_share = 0;
  std::string matrix_dtype;  // "bf16" or "f32"
  double matrix_bf16_gflops = 0;
  double matrix_f32_gflops = 0;
};

// head_dim 64 and 128, bf16; 1, 4 and 8 query heads per KV head with one query row; then 64 query rows. Each
// shape is checked against the reference before it is timed: INTERNAL when they differ. Batches stand beside
// `matrix`.
absl::StatusOr<std::vector<AttendResult>> RunAttendBench(const BenchOptions& options,
                                                         const MatrixRates& matrix);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_ATTEND_H_
