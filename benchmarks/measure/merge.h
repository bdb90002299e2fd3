#ifndef EDUBA_BENCHMARKS_MEASURE_MERGE_H_
#define EDUBA_BENCHMARKS_MEASURE_MERGE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace eduba {

struct MergeBenchOptions {
  // Or "gloo": over TCP on 127.0.0.1; or "nccl": rank r on cuda:r.
  std::string transport = "local";
  int ranks = 2;          // Each is a thread of this process.
  int64_t bytes = 33280;  // Payload per rank: one query row of 32 heads with value_dim 128 takes 33,280.
  int rounds = 1000;
  bool scatters = false;  // Times ReduceScatterI64, parts as equal as they can be, and not SumI64.
};

// Wall time of one all-reduce or reduce-scatter as rank 0 sees it, in microseconds. The ranks start their
// rounds as they come, so a round's time includes waiting for the slowest.
struct MergeBenchResult {
  double median_us = 0;
  double low_us = 0;   // 10th percentile.
  double high_us = 0;  // 90th percentile.
};

// Runs `rounds` sums of `bytes` over `ranks` ranks and times them, after it has checked one sum word by word.
// INVALID_ARGUMENT for options out of range; INTERNAL for a wrong sum; a transport's own errors as they are.
absl::StatusOr<MergeBenchResult> BenchMerge(const MergeBenchOptions& options);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_MERGE_H_
