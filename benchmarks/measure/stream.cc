#include "benchmarks/measure/stream.h"

#include <algorithm>
#include <iterator>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/huge_memory.h"
#include "kernels/cpu/page_kernels.h"

namespace eduba {
namespace {

// A way to spread a buffer over threads.
struct StreamPattern {
  const char* name;
  int64_t piece_bytes;  // 0: one run per thread.
};
constexpr StreamPattern kPatterns[] = {
    {"one run per thread", 0}, {"pieces of 1 MiB", 1 << 20}, {"pieces of 64 KiB", 1 << 16}};
constexpr int64_t kSumGrain = 256;
constexpr int64_t kFillBytes = 1 << 20;

void StreamOnce(const StreamPattern& pattern, ThreadPool& pool, const BenchBuffer& buffer,
                std::atomic<uint64_t>& sum) {
  static const PageKernels* const kernels = RunnablePageKernels().front();
  const int64_t bytes = buffer.bytes();
  const int64_t run = (bytes / pool.threads() + kSumGrain - 1) / kSumGrain * kSumGrain;
  const int64_t piece = pattern.piece_bytes > 0 ? pattern.piece_bytes : run;
  pool.ParallelFor((bytes + piece - 1) / piece, [&](int64_t i, int) {
    const int64_t size = std::min(piece, bytes - i * piece) / kSumGrain * kSumGrain;
    sum += kernels->sum_words(buffer.data() + i * piece, size);
  });
}

}  // namespace

int BenchThreads(const BenchOptions& options) {
  return options.threads > 0 ? options.threads
                             : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

BenchBuffer::BenchBuffer(int64_t bytes) : bytes_(bytes), data_(AllocateHuge(bytes)) {}
BenchBuffer::~BenchBuffer() { FreeHuge(data_, bytes_); }

StreamTimer::StreamTimer(ThreadPool& pool, const BenchBuffer& buffer)
    : pool_(pool), buffer_(buffer), seconds_(std::size(kPatterns)) {}

void StreamTimer::Round(bool counts) {
  for (size_t i = 0; i < std::size(kPatterns); ++i) {
    const double taken = Seconds([&] { StreamOnce(kPatterns[i], pool_, buffer_, sum_); });
    if (counts) seconds_[i].push_back(taken);
  }
}

StreamTimer::Best StreamTimer::best() const {
  Best best;
  for (size_t i = 0; i < std::size(kPatterns); ++i) {
    const double median = Median(seconds_[i]);
    if (best.seconds == 0 || median < best.seconds) best = {kPatterns[i].name, median};
  }
  return best;
}

absl::StatusOr<StreamResult> RunStreamBench(const BenchOptions& options) {
  ThreadPool pool(BenchThreads(options));
  const BenchBuffer buffer(options.bytes);
  if (buffer.data() == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", options.bytes, " bytes"));
  }
  pool.ParallelFor((options.bytes + kFillBytes - 1) / kFillBytes, [&](int64_t i, int) {
    const int64_t begin = i * kFillBytes;
    std::fill_n(buffer.data() + begin, std::min(kFillBytes, options.bytes - begin), static_cast<char>(i));
  });
  StreamTimer timer(pool, buffer);
  for (int round = 0; round <= options.rounds; ++round) {
    if (options.progress) options.progress("stream", round, options.rounds + 1);
    timer.Round(round > 0);
  }
  const StreamTimer::Best best = timer.best();
  return StreamResult{best.pattern, pool.threads(), options.bytes, best.seconds,
                      1e-9 * static_cast<double>(options.bytes) / best.seconds};
}

}  // namespace eduba
