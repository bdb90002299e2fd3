// eduba bench stream and eduba bench attend.

#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "benchmarks/measure/attend.h"
#include "benchmarks/measure/cuda_attend.h"
#include "cli/bench.h"
#include "cli/device.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "kernels/cuda/cuda_backend.h"

namespace eduba {
namespace {

struct KernelBenchFlags {
  bool json = false;
  int64_t bytes = BenchOptions().bytes;
  int rounds = BenchOptions().rounds;
};

struct AttendBenchFlags : KernelBenchFlags {
  std::string device = "cpu";
  std::string precision = "exact";
};

void AddKernelBenchOptions(CLI::App& command, KernelBenchFlags& flags) {
  AddBytesOption(command, "--bytes", flags.bytes,
                 "Keys and values to read, much more than the caches hold [1GiB]");
  command.add_option("--rounds", flags.rounds, "Timed rounds; medians are reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  AddJsonFlag(command, flags.json);
}

BenchOptions OptionsOf(const KernelBenchFlags& flags, ProgressReport& report) {
  BenchOptions options;
  options.bytes = flags.bytes;
  options.rounds = flags.rounds;
  options.progress = [&report](const std::string& what, int done, int total) {
    report.Parts(what, done, total);
  };
  return options;
}

absl::Status RunStream(const KernelBenchFlags& flags) {
  ProgressReport report("bench stream");
  EDUBA_ASSIGN_OR_RETURN(const StreamResult result, RunStreamBench(OptionsOf(flags, report)));
  if (flags.json) {
    PrintJson({{"pattern", result.pattern},
               {"threads", result.threads},
               {"bytes", result.bytes},
               {"seconds", result.seconds},
               {"gb_per_s", result.gb_per_s}});
  } else {
    PrintTable({{"pattern", "threads", "GB", "GB/s"},
                {result.pattern, absl::StrCat(result.threads), absl::StrFormat("%.2f", 1e-9 * result.bytes),
                 absl::StrFormat("%.2f", result.gb_per_s)}});
  }
  return absl::OkStatus();
}

void AddAttendBenchOptions(CLI::App& command, AttendBenchFlags& flags) {
  AddKernelBenchOptions(command, flags);
  AddDeviceOption(command, flags.device,
                  "What to measure; for a GPU, \"stream\" is a copy within its memory, read and written");
  AddPrecisionOption(command, flags.precision);
}

absl::StatusOr<std::vector<AttendResult>> AttendResults(const AttendBenchFlags& flags) {
  ProgressReport report("bench attend");
  if (flags.device == "cpu") {
    const BenchOptions options = OptionsOf(flags, report);
    return RunAttendBench(options, OwnMatrixRates(BenchThreads(options)));
  }
  EDUBA_ASSIGN_OR_RETURN(const int device, CudaDeviceIndex(flags.device));
  EDUBA_ASSIGN_OR_RETURN(const CudaPrecision precision, ParseCudaPrecision(flags.precision));
  return RunCudaAttendBench(device, precision, OptionsOf(flags, report));
}

absl::Status RunAttend(const AttendBenchFlags& flags) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<AttendResult> results, AttendResults(flags));
  Json list = Json::array();
  std::vector<std::vector<std::string>> table = {{"backend", "head_dim", "queries/kv", "rows", "keys",
                                                  "dtype", "ms", "GB/s", "stream GB/s", "share", "GFLOP/s",
                                                  "of matmul", "kernel ms", "its share", "of matmul"}};
  for (const AttendResult& r : results) {
    Json entry = {{"backend", r.backend},
                  {"threads", r.threads},
                  {"head_dim", r.head_dim},
                  {"queries_per_kv_head", r.queries_per_kv_head},
                  {"query_rows", r.query_rows},
                  {"keys", r.keys},
                  {"dtype", DTypeName(r.dtype)},
                  {"query_dtype", DTypeName(r.has_16_bit_queries ? r.dtype : DType::kF32)},
                  {"bytes", r.bytes},
                  {"seconds", r.seconds},
                  {"spread", r.spread},
                  {"gb_per_s", r.gb_per_s},
                  {"stream_gb_per_s", r.stream_gb_per_s},
                  {"share", r.share}};
    const bool batch = !r.matrix_dtype.empty();
    if (batch) {
      entry["gflops"] = r.gflops;
      entry["matrix_gflops"] = r.matrix_gflops;
      entry["matrix_dtype"] = r.matrix_dtype;
      entry["matrix_share"] = r.matrix_share;
      entry["matrix_bf16_gflops"] = r.matrix_bf16_gflops;
      entry["matrix_f32_gflops"] = r.matrix_f32_gflops;
    }
    const bool on_gpu = r.kernel_seconds > 0;
    if (on_gpu) {
      entry["kernel_seconds"] = r.kernel_seconds;
      entry["kernel_share"] = r.kernel_share;
      if (batch) entry["kernel_matrix_share"] = r.kernel_matrix_share;
    }
    list.push_back(std::move(entry));
    table.push_back({r.backend, absl::StrCat(r.head_dim), absl::StrCat(r.queries_per_kv_head),
                     absl::StrCat(r.query_rows), absl::StrFormat("%.0f", r.keys),
                     absl::StrCat(DTypeName(r.dtype), r.has_16_bit_queries ? ", queries too" : ""),
                     absl::StrFormat("%.3f", 1e3 * r.seconds), absl::StrFormat("%.2f", r.gb_per_s),
                     absl::StrFormat("%.2f", r.stream_gb_per_s), absl::StrFormat("%.2f", r.share),
                     batch ? absl::StrFormat("%.1f", r.gflops) : "",
                     batch ? absl::StrFormat("%.2f %s", r.matrix_share, r.matrix_dtype) : "",
                     on_gpu ? absl::StrFormat("%.3f", 1e3 * r.kernel_seconds) : "",
                     on_gpu ? absl::StrFormat("%.2f", r.kernel_share) : "",
                     on_gpu && batch ? absl::StrFormat("%.2f", r.kernel_matrix_share) : ""});
  }
  if (flags.json) {
    PrintJson(list);
  } else {
    PrintTable(table);
  }
  return absl::OkStatus();
}

}  // namespace

void AddKernelBenches(CLI::App& bench, Command& chosen) {
  AddCommand(bench, "stream", "Reading memory once: the ceiling of a query", chosen, AddKernelBenchOptions,
             RunStream);
  AddCommand(bench, "attend", "Attention over pages, beside reading memory and multiplying matrices", chosen,
             AddAttendBenchOptions, RunAttend);
}

}  // namespace eduba
