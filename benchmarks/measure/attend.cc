#include "benchmarks/measure/attend.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "benchmarks/measure/attend_problem.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace eduba {
namespace {

// The same small problem on both backends.
absl::Status CheckAgainstReference(Backend& backend, const AttentionShape& shape, int rows) {
  constexpr int64_t kPages = 3;
  ThreadPool pool(1);
  const auto reference = MakeReferenceBackend();
  const BenchBuffer memory(kPages * backend.PageBytes(shape));
  const BenchBuffer reference_memory(kPages * reference->PageBytes(shape));
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

AttentionShape ShapeOf(const Case& c) {
  AttentionShape shape;
  shape.kv_heads = kKvHeads;
  shape.query_heads = kKvHeads * c.group;
  shape.head_dim = shape.value_dim = c.head_dim;
  shape.key_dtype = shape.value_dtype = DType::kBf16;
  shape.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  return shape;
}

// Times of each round that counts, of the kernel and of its ceilings.
struct Times {
  std::vector<double> attend;
  std::vector<double> f32_gflops;
  std::vector<double> bf16_gflops;
};

void FillMatrixShare(const Times& times, double operations, AttendResult& r) {
  r.gflops = 1e-9 * operations / r.seconds;
  r.matrix_f32_gflops = Median(times.f32_gflops);
  r.matrix_bf16_gflops = times.bf16_gflops.empty() ? 0 : Median(times.bf16_gflops);
  r.matrix_gflops = std::max(r.matrix_f32_gflops, r.matrix_bf16_gflops);
  r.matrix_dtype = r.matrix_bf16_gflops > r.matrix_f32_gflops ? "bf16" : "f32";
  r.matrix_share = r.gflops / r.matrix_gflops;
}

absl::StatusOr<AttendResult> RunCase(Backend& backend, ThreadPool& pool, const Case& c,
                                     const BenchOptions& options, const MatrixRates& matrix) {
  const AttentionShape shape = ShapeOf(c);
  EDUBA_RETURN_IF_ERROR(CheckAgainstReference(backend, shape, c.rows));

  const bool batch = c.rows > 1;
  const int64_t wanted = batch ? std::min(options.bytes, kBatchBytes) : options.bytes;
  const int64_t pages = std::max<int64_t>(1, wanted / backend.PageBytes(shape));
  const BenchBuffer memory(pages * backend.PageBytes(shape));
  if (memory.data() == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", wanted, " bytes"));
  }
  const AttendProblem problem(backend, shape, c.rows, pages, memory.data(), pool);
  Times times;
  StreamTimer stream(pool, memory);
  std::vector<float> outputs;
  for (int round = 0; round <= options.rounds; ++round) {
    absl::Status status;
    const double taken = Seconds([&] { status = AttendOnce(backend, problem.args(), outputs); });
    EDUBA_RETURN_IF_ERROR(status);
    if (round > 0) times.attend.push_back(taken);
    stream.Round(round > 0);
    if (batch) times.f32_gflops.push_back(matrix.f32());
    if (batch && matrix.bf16) times.bf16_gflops.push_back(matrix.bf16());
  }

  AttendResult r;
  r.backend = backend.name();
  r.threads = pool.threads();
  r.head_dim = c.head_dim;
  r.kv_heads = kKvHeads;
  r.queries_per_kv_head = c.group;
  r.query_rows = c.rows;
  r.keys = static_cast<double>(pages * kPageRows);
  r.bytes = memory.bytes();
  r.seconds = Median(times.attend);
  const auto [fastest, slowest] = std::minmax_element(times.attend.begin(), times.attend.end());
  r.spread = (*slowest - *fastest) / r.seconds;
  const double gigabytes = 1e-9 * static_cast<double>(r.bytes);
  r.gb_per_s = gigabytes / r.seconds;
  r.stream_gb_per_s = gigabytes / stream.best().seconds;
  r.share = r.gb_per_s / r.stream_gb_per_s;
  if (batch) {
    FillMatrixShare(times, 2.0 * c.rows * shape.query_heads * r.keys * (shape.head_dim + shape.value_dim), r);
  }
  return r;
}

}  // namespace

absl::StatusOr<std::vector<AttendResult>> RunAttendBench(const BenchOptions& options,
                                                         const MatrixRates& matrix) {
  const auto backend = MakeCpuBackend(BenchThreads(options));
  ThreadPool pool(BenchThreads(options));
  std::vector<AttendResult> results;
  for (const Case& c : kCases) {
    if (options.progress) {
      options.progress(
          absl::StrFormat("attend head_dim=%d queries_per_kv_head=%d rows=%d", c.head_dim, c.group, c.rows),
          static_cast<int>(results.size()), static_cast<int>(std::size(kCases)));
    }
    EDUBA_ASSIGN_OR_RETURN(AttendResult result, RunCase(*backend, pool, c, options, matrix));
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace eduba
