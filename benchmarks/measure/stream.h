#ifndef EDUBA_BENCHMARKS_MEASURE_STREAM_H_
#define EDUBA_BENCHMARKS_MEASURE_STREAM_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/parallel.h"
#include "benchmarks/measure/timing.h"

namespace eduba {

struct BenchOptions {
  int threads = 0;  // 0: all that this process may use.
  // The bytes of keys and values, and of the streamed buffer: much more than the caches hold.
  int64_t bytes = int64_t{1} << 30;
  int rounds = 9;          // Timed rounds after one that is not.
  BenchProgress progress;  // May be empty.
};

// The threads that `options` ask for.
int BenchThreads(const BenchOptions& options);

// Memory from huge pages. Null where there is none.
class BenchBuffer {
 public:
  explicit BenchBuffer(int64_t bytes);
  ~BenchBuffer();
  BenchBuffer(const BenchBuffer&) = delete;
  BenchBuffer& operator=(const BenchBuffer&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  void* data_;
};

// Times reading a buffer once with several access patterns, round by round: which is fastest depends on the
// machine.
class StreamTimer {
 public:
  // Both outlive it.
  StreamTimer(ThreadPool& pool, const BenchBuffer& buffer);

  // Reads the buffer once with each pattern. `counts`: whether the times are kept.
  void Round(bool counts);

  struct Best {
    std::string pattern;  // "one run per thread", ...
    double seconds = 0;   // Median of the rounds.
  };
  // REQUIRES: one round that counts.
  Best best() const;

 private:
  ThreadPool& pool_;
  const BenchBuffer& buffer_;
  std::vector<std::vector<double>> seconds_;  // By pattern.
  std::atomic<uint64_t> sum_ = 0;             // The sum of all words, kept where no optimiser can lose it.
};

// Reading memory once and doing next to nothing with it: the ceiling of a query on its own. Best of several
// access patterns.
struct StreamResult {
  std::string pattern;
  int threads = 0;
  int64_t bytes = 0;
  double seconds = 0;   // Median of the rounds.
  double gb_per_s = 0;  // 10^9 bytes a second.
};

// RESOURCE_EXHAUSTED without memory for options.bytes.
absl::StatusOr<StreamResult> RunStreamBench(const BenchOptions& options);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_STREAM_H_
