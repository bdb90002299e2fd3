#ifndef EDUBA_KERNELS_BENCH_H_
#define EDUBA_KERNELS_BENCH_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"

namespace eduba {

// Benchmarks of the CPU kernels against ceilings measured in the same run, on the same memory. Rounds of
// kernel and ceiling take turns, and medians are compared, so that a neighbour's load falls on both.

// Called before each part with what is measured next, and which of how many it is.
using BenchProgress = std::function<void(const std::string& what, int done, int total)>;

struct BenchOptions {
  int threads = 0;  // 0: all that this process may use.
  int64_t bytes =
      int64_t{1} << 30;    // Of keys and values, and of the streamed buffer: much more than the caches hold.
  int rounds = 9;          // Timed rounds after one that is not.
  BenchProgress progress;  // May be empty.
};

// Reading memory once and doing next to nothing with it: the ceiling of a query on its own. Best of several
// access patterns.
struct StreamResult {
  std::string pattern;  // "one run per thread", ...
  int threads = 0;
  int64_t bytes = 0;
  double seconds = 0;   // Median of the rounds.
  double gb_per_s = 0;  // 10^9 bytes a second.
};

// One step of attention, from StartStep to Finish.
struct AttendResult {
  std::string backend;  // "cpu/AVX2"
  int threads = 0;
  int head_dim = 0;  // Of keys and values.
  int kv_heads = 0;
  int queries_per_kv_head = 0;
  int query_rows = 0;
  double keys = 0;  // That a row sees, on average.
  DType dtype = DType::kBf16;
  int64_t bytes = 0;   // Of keys and values, each counted once.
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
  // beside the rate of a large oneDNN matmul on this machine. The ceiling is the faster of bf16 and f32:
  // chips without bf16 do it slowly.
  double gflops = 0;
  double matrix_gflops = 0;
  double matrix_share = 0;
  std::string matrix_dtype;  // "bf16" or "f32"
  double matrix_bf16_gflops = 0;
  double matrix_f32_gflops = 0;
};

absl::StatusOr<StreamResult> RunStreamBench(const BenchOptions& options);

// head_dim 64 and 128, bf16; 1, 4 and 8 query heads per KV head with one query row; then 64 query rows. Each
// shape is checked against the reference before it is timed: INTERNAL when they differ.
absl::StatusOr<std::vector<AttendResult>> RunAttendBench(const BenchOptions& options);

}  // namespace eduba

#endif  // EDUBA_KERNELS_BENCH_H_
