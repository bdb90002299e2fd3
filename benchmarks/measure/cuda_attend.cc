#include "benchmarks/measure/cuda_attend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "benchmarks/measure/attend_problem.h"
#include "benchmarks/measure/cuda_matrix_rate.h"
#include "benchmarks/measure/timing.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/reference/reference_backend.h"

namespace eduba {
namespace {

constexpr int kHeadDim = 128;
constexpr int kKvHeads = 8;
constexpr int64_t kKeyBytes = int64_t{kKvHeads} * 2 * kHeadDim * 2;
// A copy of fewer bytes would be served by the second-level cache.
constexpr int kCheckRows = 64;  // The rows of a prefill that are compared with the reference.
constexpr int64_t kCopyBytesMin = int64_t{256} << 20;

struct Case {
  int64_t keys;
  int group;
  int rows;
  bool is_causal = false;
  int64_t window = 0;  // 0: all keys.
  DType dtype = DType::kBf16;
  // Asked of tensor cores alone, because no other kernel takes them differently.
  bool has_16_bit_queries = false;
};
constexpr Case kCases[] = {{8 << 10, 1, 1},
                           {8 << 10, 4, 1},
                           {8 << 10, 8, 1},
                           {64 << 10, 1, 1},
                           {64 << 10, 4, 1},
                           {64 << 10, 8, 1},
                           {1 << 20, 1, 1},
                           {1 << 20, 4, 1},
                           {1 << 20, 8, 1},
                           {4 << 20, 1, 1},
                           {4 << 20, 4, 1},
                           {4 << 20, 8, 1},
                           {64 << 10, 1, 64},
                           {64 << 10, 4, 64},
                           {32 << 10, 4, 2048, true},
                           {32 << 10, 4, 2048, true, 4096},
                           {32 << 10, 4, 2048, true, 0, DType::kBf16, true},
                           {32 << 10, 4, 2048, true, 4096, DType::kBf16, true},
                           {32 << 10, 4, 2048, true, 0, DType::kF16, true},
                           {32 << 10, 4, 2048, true, 4096, DType::kF16, true}};

// Page memory that goes back to its backend.
class Slab {
 public:
  Slab(Backend& backend, int64_t bytes, void* data) : backend_(backend), bytes_(bytes), data_(data) {}
  ~Slab() { backend_.FreeSlab(data_, bytes_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  Backend& backend_;
  const int64_t bytes_;
  void* const data_;
};

AttentionShape ShapeOf(const Case& c) {
  AttentionShape shape;
  shape.kv_heads = kKvHeads;
  shape.query_heads = kKvHeads * c.group;
  shape.head_dim = shape.value_dim = kHeadDim;
  shape.key_dtype = shape.value_dtype = c.dtype;
  shape.scale = 1 / std::sqrt(static_cast<float>(kHeadDim));
  return shape;
}

absl::StatusOr<std::vector<float>> SmallAnswer(Backend& backend, const AttentionShape& shape, int rows) {
  constexpr int64_t kPages = 3;
  const int64_t bytes = kPages * backend.PageBytes(shape);
  EDUBA_ASSIGN_OR_RETURN(void* const memory, backend.AllocateSlab(bytes));
  const Slab slab(backend, bytes, memory);
  ThreadPool pool(1);
  const AttendProblem problem(backend, shape, rows, kPages, slab.data(), pool);
  std::vector<float> outputs;
  EDUBA_RETURN_IF_ERROR(AttendOnce(backend, problem.args(), outputs));
  return outputs;
}

absl::Status CheckAgainstReference(Backend& backend, const AttentionShape& shape, int rows, double most) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<float> outputs, SmallAnswer(backend, shape, rows));
  EDUBA_ASSIGN_OR_RETURN(const std::vector<float> wanted, SmallAnswer(*MakeReferenceBackend(), shape, rows));
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(outputs[i] - wanted[i], 2);
    norm += std::pow(wanted[i], 2);
  }
  if (error <= most * most * norm) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(backend.name(), " is off by ", std::sqrt(error / norm),
                                          " relative to the reference; at most ", most, " is wanted"));
}

// Copies half of a block onto the other half.
class Copier {
 public:
  explicit Copier(cuda::Device& device) : device_(device), memory_(device, cuda::Memory::Kind::kDevice) {}
  ~Copier() {
    if (stream_ != nullptr) device_.DestroyStream(stream_);
  }
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  absl::Status Init(int64_t bytes) {
    half_ = bytes;
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    EDUBA_ASSIGN_OR_RETURN(stream_, device_.CreateStream());
    EDUBA_RETURN_IF_ERROR(memory_.ReserveExactly(2 * bytes));
    return device_.Zero(stream_, memory_.data(), 2 * bytes);
  }

  // 10^9 bytes a second, read and written.
  absl::StatusOr<double> Measure() {
    constexpr int kRepeats = 4;
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(stream_));
    absl::Status status;
    const double seconds = Seconds([&] {
      for (int i = 0; i < kRepeats && status.ok(); ++i) {
        status = device_.CopyWithin(stream_, memory_.data() + half_, memory_.data(), half_);
      }
      if (status.ok()) status = device_.Synchronize(stream_);
    });
    EDUBA_RETURN_IF_ERROR(status);
    return 2e-9 * kRepeats * static_cast<double>(half_) / seconds;
  }

 private:
  cuda::Device& device_;
  cuda::Memory memory_;
  cuda::Stream stream_ = nullptr;
  int64_t half_ = 0;
};

absl::StatusOr<AttendResult> RunCase(Backend& backend, cuda::Device& device, Copier& copier,
                                     cuda::MatrixRate& matrix, const Case& c, int rounds, double most,
                                     ThreadPool& pool) {
  const AttentionShape shape = ShapeOf(c);
  EDUBA_RETURN_IF_ERROR(CheckAgainstReference(backend, shape, std::min(c.rows, kCheckRows), most));
  const int64_t pages = c.keys / kPageRows;
  const int64_t bytes = pages * backend.PageBytes(shape);
  EDUBA_ASSIGN_OR_RETURN(void* const memory, backend.AllocateSlab(bytes));
  const Slab slab(backend, bytes, memory);
  const AttendProblem problem(backend, shape, c.rows, pages, slab.data(), pool, c.is_causal, c.window,
                              c.has_16_bit_queries);
  std::vector<double> attend;
  std::vector<double> kernels;
  std::vector<double> copies;
  std::vector<double> products;
  std::vector<float> outputs;
  for (int round = 0; round <= rounds; ++round) {
    absl::Status status;
    const double taken = Seconds([&] { status = AttendOnce(backend, problem.args(), outputs); });
    EDUBA_RETURN_IF_ERROR(status);
    EDUBA_ASSIGN_OR_RETURN(const double busy, device.AttentionSeconds());
    EDUBA_ASSIGN_OR_RETURN(const double copied, copier.Measure());
    double rate = 0;
    if (c.rows > 1) {
      EDUBA_ASSIGN_OR_RETURN(rate, matrix.Measure());
    }
    if (round == 0) continue;
    attend.push_back(taken);
    kernels.push_back(busy);
    copies.push_back(copied);
    products.push_back(rate);
  }
  AttendResult r;
  r.backend = backend.name();
  r.threads = pool.threads();
  r.head_dim = kHeadDim;
  r.kv_heads = kKvHeads;
  r.queries_per_kv_head = c.group;
  r.query_rows = c.rows;
  r.keys = problem.pairs() / c.rows;
  r.dtype = c.dtype;
  r.has_16_bit_queries = c.has_16_bit_queries;
  // Keys and values alone: the kernels do not read the pages' headers.
  r.bytes = problem.seen_pages() * (backend.PageBytes(shape) - int64_t{sizeof(PageHeader)});
  r.seconds = Median(attend);
  const auto [fastest, slowest] = std::minmax_element(attend.begin(), attend.end());
  r.spread = (*slowest - *fastest) / r.seconds;
  r.gb_per_s = 1e-9 * static_cast<double>(r.bytes) / r.seconds;
  r.stream_gb_per_s = Median(copies);
  r.share = r.gb_per_s / r.stream_gb_per_s;
  r.kernel_seconds = Median(kernels);
  r.kernel_share = r.share * r.seconds / r.kernel_seconds;
  r.gflops = 4e-9 * shape.query_heads * problem.pairs() * kHeadDim / r.seconds;
  if (c.rows > 1) {
    r.matrix_gflops = r.matrix_bf16_gflops = Median(products);
    r.matrix_dtype = absl::StrCat("bf16 ", matrix.name());
    r.matrix_share = r.gflops / r.matrix_gflops;
    r.kernel_matrix_share = r.matrix_share * r.seconds / r.kernel_seconds;
  }
  return r;
}

}  // namespace

absl::StatusOr<std::vector<AttendResult>> RunCudaAttendBench(int device, CudaPrecision precision,
                                                             const BenchOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(auto own, cuda::OpenCudaDevice(device));
  EDUBA_ASSIGN_OR_RETURN(auto copies, cuda::OpenCudaDevice(device));
  return RunCudaAttendBenchOn(std::move(own), std::move(copies), precision, options);
}

absl::StatusOr<std::vector<AttendResult>> RunCudaAttendBenchOn(std::unique_ptr<cuda::Device> device,
                                                               std::unique_ptr<cuda::Device> copies,
                                                               CudaPrecision precision,
                                                               const BenchOptions& options) {
  CudaOptions cuda;
  cuda.precision = precision;
  cuda.page_bytes = options.bytes;
  cuda.threads = options.threads > 0 ? options.threads
                                     : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const std::shared_ptr<cuda::Device> timed = std::move(device);
  timed->TimeAttention();
  EDUBA_ASSIGN_OR_RETURN(const auto backend, MakeCudaBackendOn(timed, cuda));
  Copier copier(*copies);
  EDUBA_RETURN_IF_ERROR(copier.Init(std::min(kCopyBytesMin, std::max<int64_t>(options.bytes, 256))));
  EDUBA_ASSIGN_OR_RETURN(const auto matrix, cuda::MatrixRate::Make(*copies));
  const bool emulated = copies->is_emulated();
  const double most = precision == CudaPrecision::kExact ? 3e-6 : 3e-4;
  ThreadPool pool(cuda.threads);
  std::vector<AttendResult> results;
  int done = 0;
  for (const Case& c : kCases) {
    if (options.progress) {
      options.progress(absl::StrFormat("attend keys=%d queries_per_kv_head=%d rows=%d%s window=%d", c.keys,
                                       c.group, c.rows, c.is_causal ? " causal" : "", c.window),
                       done++, static_cast<int>(std::size(kCases)));
    }
    if (c.has_16_bit_queries && precision != CudaPrecision::kTensor) continue;
    // A host that emulates a GPU would take an hour for a prefill.
    if (c.keys * kKeyBytes > options.bytes || (emulated && c.rows > kCheckRows)) continue;
    EDUBA_ASSIGN_OR_RETURN(const AttendResult result,
                           RunCase(*backend, *timed, copier, *matrix, c, options.rounds, most, pool));
    results.push_back(result);
  }
  if (results.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("bench attend: --bytes is ", options.bytes, ", wanted ",
                                                   kCases[0].keys * kKeyBytes, " or more"));
  }
  return results;
}

}  // namespace eduba
