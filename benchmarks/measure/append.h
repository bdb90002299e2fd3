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
  // Address of another such service, which keeps its sessions in `data_dir`. Empty: not measured.
  std::string lasting_server;
  std::string data_dir;
  BenchProgress progress;  // May be empty.
};

struct AppendBenchResult {
  int64_t bytes = 0;              // What one append has, in whole positions.
  double stream_bytes_per_s = 0;  // The same messages to a gRPC service that drops them: the ceiling.
  double append_bytes_per_s = 0;  // From plan to commit.
  // The same where sessions are kept on a disk, and of a file of as many bytes, written there and synced.
  double lasting_bytes_per_s = 0;
  double disk_bytes_per_s = 0;
};

// Medians of rounds of appends and of their ceilings, which alternate, so that a neighbour's load falls on
// all of them. Errors of the client and of gRPC as they are.
absl::StatusOr<AppendBenchResult> RunAppendBench(const AppendBenchOptions& options);

// Appends the same rows to a new session "bench" of the service, and leaves it there.
absl::Status FillBenchSession(const std::string& server, int64_t bytes);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_APPEND_H_
