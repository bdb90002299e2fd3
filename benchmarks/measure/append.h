#ifndef EDUBA_BENCHMARKS_MEASURE_APPEND_H_
#define EDUBA_BENCHMARKS_MEASURE_APPEND_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "benchmarks/measure/timing.h"

namespace eduba {

struct AppendBenchOptions {
  std::string server;  // Address of a service with one worker; the session "bench" is made and deleted there.
  int64_t bytes = int64_t{256} << 20;  // Keys and values of one append.
  int rounds = 5;                      // Timed rounds of each after one that is not.
  BenchProgress progress;              // May be empty.
};

struct AppendBenchResult {
  int64_t bytes = 0;              // What one append has, in whole positions.
  double stream_bytes_per_s = 0;  // The same messages to a gRPC service that drops them: the ceiling.
  double append_bytes_per_s = 0;  // From plan to commit.
};

// Medians of rounds of appends and of bare uploads, which alternate, so that a neighbour's load falls on
// both. Errors of the client and of gRPC as they are.
absl::StatusOr<AppendBenchResult> RunAppendBench(const AppendBenchOptions& options);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_APPEND_H_
