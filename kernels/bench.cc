#include "kernels/bench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "kernels/bench_problem.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/huge_memory.h"
#include "kernels/cpu/page_kernels.h"
#include "kernels/reference/reference_backend.h"

namespace eduba {
namespace {

int Threads(const BenchOptions& options) {
  return options.threads > 0 ? options.threads
                             : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Ways to spread a buffer over threads; what is fastest depends on the machine.
struct StreamPattern {
  const char* name;
  int64_t piece_bytes;  // 0: one run per thread.
};
constexpr StreamPattern kPatterns[] = {
    {"one run per thread", 0}, {"pieces of 1 MiB", 1 << 20}, {"pieces of 64 KiB", 1 << 16}};
constexpr int64_t kSumGrain = 256;

// Reads the buffer once. The sum goes where no optimiser can lose it.
void StreamOnce(const StreamPattern& pattern, ThreadPool& pool, const void* data, int64_t bytes,
                std::atomic<uint64_t>& sum) {
  static const PageKernels* const kernels = RunnablePageKernels().front();
  const int64_t run = (bytes / pool.threads() + kSumGrain - 1) / kSumGrain * kSumGrain;
  const int64_t piece = pattern.piece_bytes > 0 ? pattern.piece_bytes : run;
  pool.ParallelFor((bytes + piece - 1) / piece, [&](int64_t i, int) {
    const int64_t size = std::min(piece, bytes - i * piece) / kSumGrain * kSumGrain;
    sum += kernels->sum_words(static_cast<const char*>(data) + i * piece, size);
  });
}

// Memory from huge pages, all of it touched.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), data_(AllocateHuge(bytes)) {}
  ~Buffer() { FreeHuge(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  void* data_;
};

// The same small problem on both backends.
absl::Status CheckAgainstReference(Backend& backend, const AttentionShape& shape, int rows) {
  constexpr int64_t kPages = 3;
  ThreadPool pool(1);
  const auto reference = MakeReferenceBackend();
  const Buffer memory(kPages * backend.PageBytes(shape));
  const Buffer reference_memory(kPages * reference->PageBytes(shape));
  if (memory.data() == nullptr || reference_memory.data() == nullptr) {
    return absl::ResourceExhaustedError("no memory");
  }
  const AttendProblem problem(backend, shape, rows, kPages, memory.data(), pool);
  const AttendProblem reference_problem(*reference, shape, rows, kPages, reference_memory.data(), pool);
  std::vector<float> outputs;
  std::vector<float> wanted;
  EDUBA_RETURN_IF_ERROR(AttendOnce(backend, problem.args(), outputs));
  EDUBA_RETURN_IF_ERROR(AttendOnce(*reference, reference_problem.args(), wanted));
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(outputs[i] - wanted[i], 2);
    norm += std::pow(wanted[i], 2);
  }
  if (!(error <= 9e-12 * norm)) {
    return absl::InternalError(absl::StrCat(backend.name(), " is off by ", std::sqrt(error / norm),
                                            " relative to the reference; at most 3e-6 is wanted"));
  }
  return absl::OkStatus();
}

// One large matrix product, repeated.
class Matmul {
 public:
  explicit Matmul(dnnl::memory::data_type type) {
    using dnnl::memory;
    const memory::desc in({kSize, kSize}, type, memory::format_tag::ab);
    // The right-hand side in the order the library likes best, as weights are in use.
    const memory::desc weights({kSize, kSize}, type, memory::format_tag::any);
    const memory::desc out({kSize, kSize}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(in, weights, out), engine_);
    a_ = memory(in, engine_);
    b_ = memory(desc.weights_desc(), engine_);
    c_ = memory(out, engine_);
    for (const memory& m : {a_, b_, c_}) {
      std::fill_n(static_cast<char*>(m.get_data_handle()), m.get_desc().get_size(), 0);
    }
    matmul_ = dnnl::matmul(desc);
  }
  double Gflops() {
    const double seconds = Seconds([&] {
      matmul_.execute(stream_, {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}});
      stream_.wait();
    });
    return 2e-9 * kSize * kSize * kSize / seconds;
  }

 private:
  static constexpr int64_t kSize = 1024;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::memory a_;
  dnnl::memory b_;
  dnnl::memory c_;
  dnnl::matmul matmul_;
};

struct Case {
  int head_dim;
  int group;
  int rows;
};
constexpr Case kCases[] = {{64, 1, 1},  {64, 4, 1},  {64, 8, 1},  {128, 1, 1},
                           {128, 4, 1}, {128, 8, 1}, {64, 1, 64}, {128, 1, 64}};
constexpr int kKvHeads = 4;
// A batch reads each byte for many query vectors: a smaller session takes long enough.
constexpr int64_t kBatchBytes = int64_t{64} << 20;

}  // namespace

absl::StatusOr<StreamResult> RunStreamBench(const BenchOptions& options) {
  ThreadPool pool(Threads(options));
  const Buffer buffer(options.bytes);
  if (buffer.data() == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", options.bytes, " bytes"));
  }
  pool.ParallelFor((options.bytes + (1 << 20) - 1) >> 20, [&](int64_t i, int) {
    std::fill_n(buffer.data() + (i << 20), std::min<int64_t>(1 << 20, options.bytes - (i << 20)),
                static_cast<char>(i));
  });
  std::vector<std::vector<double>> seconds(std::size(kPatterns));
  std::atomic<uint64_t> sum = 0;
  for (int round = 0; round <= options.rounds; ++round) {
    if (options.progress) options.progress("stream", round, options.rounds + 1);
    for (size_t i = 0; i < std::size(kPatterns); ++i) {
      const double taken =
          Seconds([&] { StreamOnce(kPatterns[i], pool, buffer.data(), options.bytes, sum); });
      if (round > 0) seconds[i].push_back(taken);
    }
  }
  StreamResult best;
  for (size_t i = 0; i < std::size(kPatterns); ++i) {
    const double median = Median(seconds[i]);
    if (best.seconds == 0 || median < best.seconds) {
      best = {kPatterns[i].name, pool.threads(), options.bytes, median,
              1e-9 * static_cast<double>(options.bytes) / median};
    }
  }
  return best;
}

absl::StatusOr<std::vector<AttendResult>> RunAttendBench(const BenchOptions& options) {
  const auto backend = MakeCpuBackend(Threads(options));
  ThreadPool pool(Threads(options));
  std::vector<AttendResult> results;
  for (const Case& c : kCases) {
    AttentionShape shape;
    shape.kv_heads = kKvHeads;
    shape.query_heads = kKvHeads * c.group;
    shape.head_dim = shape.value_dim = c.head_dim;
    shape.key_dtype = shape.value_dtype = DType::kBf16;
    shape.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
    if (options.progress) {
      options.progress(
          absl::StrFormat("attend head_dim=%d queries_per_kv_head=%d rows=%d", c.head_dim, c.group, c.rows),
          static_cast<int>(results.size()), static_cast<int>(std::size(kCases)));
    }
    EDUBA_RETURN_IF_ERROR(CheckAgainstReference(*backend, shape, c.rows));

    const bool batch = c.rows > 1;
    const int64_t wanted = batch ? std::min(options.bytes, kBatchBytes) : options.bytes;
    const int64_t pages = std::max<int64_t>(1, wanted / backend->PageBytes(shape));
    const Buffer memory(pages * backend->PageBytes(shape));
    if (memory.data() == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", wanted, " bytes"));
    }
    const AttendProblem problem(*backend, shape, c.rows, pages, memory.data(), pool);
    std::unique_ptr<Matmul> f32;
    std::unique_ptr<Matmul> bf16;
    if (batch) {
      f32 = std::make_unique<Matmul>(dnnl::memory::data_type::f32);
      try {
        bf16 = std::make_unique<Matmul>(dnnl::memory::data_type::bf16);
      } catch (const dnnl::error&) {  // This chip has none, and the library no stand-in.
      }
    }

    std::vector<double> attend;
    std::vector<std::vector<double>> stream(std::size(kPatterns));
    std::vector<double> f32_rates;
    std::vector<double> bf16_rates;
    std::atomic<uint64_t> sum = 0;
    std::vector<float> outputs;
    for (int round = 0; round <= options.rounds; ++round) {
      absl::Status status;
      const double taken = Seconds([&] { status = AttendOnce(*backend, problem.args(), outputs); });
      EDUBA_RETURN_IF_ERROR(status);
      if (round > 0) attend.push_back(taken);
      for (size_t i = 0; i < std::size(kPatterns); ++i) {
        const double streamed =
            Seconds([&] { StreamOnce(kPatterns[i], pool, memory.data(), memory.bytes(), sum); });
        if (round > 0) stream[i].push_back(streamed);
      }
      if (f32) f32_rates.push_back(f32->Gflops());
      if (bf16) bf16_rates.push_back(bf16->Gflops());
    }

    AttendResult r;
    r.backend = backend->name();
    r.threads = pool.threads();
    r.head_dim = c.head_dim;
    r.kv_heads = kKvHeads;
    r.queries_per_kv_head = c.group;
    r.query_rows = c.rows;
    r.keys = static_cast<double>(pages * kPageRows);
    r.bytes = memory.bytes();
    r.seconds = Median(attend);
    r.spread =
        (*std::max_element(attend.begin(), attend.end()) - *std::min_element(attend.begin(), attend.end())) /
        r.seconds;
    const double gigabytes = 1e-9 * static_cast<double>(r.bytes);
    r.gb_per_s = gigabytes / r.seconds;
    for (const auto& seconds : stream) {
      r.stream_gb_per_s = std::max(r.stream_gb_per_s, gigabytes / Median(seconds));
    }
    r.share = r.gb_per_s / r.stream_gb_per_s;
    if (batch) {
      const double operations = 2.0 * c.rows * shape.query_heads * static_cast<double>(pages * kPageRows) *
                                (shape.head_dim + shape.value_dim);
      r.gflops = 1e-9 * operations / r.seconds;
      r.matrix_f32_gflops = Median(f32_rates);
      r.matrix_bf16_gflops = bf16_rates.empty() ? 0 : Median(bf16_rates);
      r.matrix_gflops = std::max(r.matrix_f32_gflops, r.matrix_bf16_gflops);
      r.matrix_dtype = r.matrix_bf16_gflops > r.matrix_f32_gflops ? "bf16" : "f32";
      r.matrix_share = r.gflops / r.matrix_gflops;
    }
    results.push_back(r);
  }
  return results;
}

}  // namespace eduba
