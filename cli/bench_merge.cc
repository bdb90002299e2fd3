// eduba bench merge.

#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "benchmarks/measure/merge.h"
#include "cli/bench.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "collective/nccl/nccl_api.h"
#include "kernels/cuda/cuda_device.h"

namespace eduba {
namespace {

struct MergeFlags {
  bool json = false;
  int ranks = 2;
  int rounds = MergeBenchOptions().rounds;
};

void AddMergeOptions(CLI::App& command, MergeFlags& options) {
  command.add_option("--ranks", options.ranks, "Ranks, each a thread of this process")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command.add_option("--rounds", options.rounds, "Timed calls of each size")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  AddJsonFlag(command, options.json);
}

// Payload of one merge: query_heads * (value_dim + 2) words for each query row: sums, total and a flag for
// each head.
struct MergeSize {
  int rows;
  int query_heads;
  int value_dim;
  bool scatters = false;  // To the ranks whose rows they are, as in sequence-parallel prefill.
};
constexpr MergeSize kMergeSizes[] = {{1, 8, 64}, {1, 32, 128}, {64, 32, 128}, {64, 32, 128, true}};

absl::Status RunMerge(const MergeFlags& options) {
  Json list = Json::array();
  std::vector<std::vector<std::string>> rows = {
      {"transport", "ranks", "call", "rows", "heads", "value_dim", "bytes", "median us", "p10 us", "p90 us"}};
  std::vector<std::string> transports = {"local", "gloo"};
  // NCCL where every rank can have a GPU of its own.
  const auto machine = cuda::DescribeCuda();
  if (machine.ok() && LoadNccl().ok() && static_cast<int>(machine->gpus.size()) >= options.ranks) {
    transports.push_back("nccl");
  }
  for (const std::string& transport : transports) {
    for (const MergeSize& size : kMergeSizes) {
      MergeBenchOptions bench;
      bench.transport = transport;
      bench.ranks = options.ranks;
      bench.rounds = options.rounds;
      bench.bytes = int64_t{8} * size.rows * size.query_heads * (size.value_dim + 2);
      bench.scatters = size.scatters;
      const std::string call = size.scatters ? "reduce-scatter" : "all-reduce";
      EDUBA_ASSIGN_OR_RETURN(const MergeBenchResult result, BenchMerge(bench));
      list.push_back({{"transport", transport},
                      {"ranks", options.ranks},
                      {"call", call},
                      {"query_rows", size.rows},
                      {"query_heads", size.query_heads},
                      {"value_dim", size.value_dim},
                      {"bytes", bench.bytes},
                      {"median_us", result.median_us},
                      {"low_us", result.low_us},
                      {"high_us", result.high_us}});
      rows.push_back({transport, absl::StrCat(options.ranks), call, absl::StrCat(size.rows),
                      absl::StrCat(size.query_heads), absl::StrCat(size.value_dim), absl::StrCat(bench.bytes),
                      absl::StrFormat("%.1f", result.median_us), absl::StrFormat("%.1f", result.low_us),
                      absl::StrFormat("%.1f", result.high_us)});
    }
  }
  if (options.json) {
    PrintJson(list);
  } else {
    PrintTable(rows);
  }
  return absl::OkStatus();
}

}  // namespace

void AddMergeBench(CLI::App& bench, Command& chosen) {
  AddCommand(
      bench, "merge",
      "The all-reduce of one step, and the reduce-scatter of sequence-parallel prefill, for each transport",
      chosen, AddMergeOptions, RunMerge);
}

}  // namespace eduba
