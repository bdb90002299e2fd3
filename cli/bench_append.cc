// eduba bench append.

#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <memory>
#include <string>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "benchmarks/measure/append.h"
#include "benchmarks/measure/disk.h"
#include "benchmarks/measure/timing.h"
#include "cli/bench.h"
#include "cli/embedded_cluster.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "cli/wait_for_group.h"

namespace eduba {
namespace {

struct AppendBenchFlags {
  bool json = false;
  int64_t bytes = AppendBenchOptions().bytes;
  int rounds = AppendBenchOptions().rounds;
  std::string data_dir;
};

void AddOptions(CLI::App& command, AppendBenchFlags& options) {
  AddBytesOption(command, "--bytes", options.bytes, "Keys and values of one append [256MiB]");
  command.add_option("--rounds", options.rounds, "Timed rounds of each; medians are reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command.add_option("--data-dir", options.data_dir,
                     "Folder on the disk that is measured too: appends that are kept there, and a start that "
                     "reads one again; "
                     "a folder in it is made and removed [no disk]");
  AddJsonFlag(command, options.json);
}

// `data_dir` empty: in memory.
absl::StatusOr<std::unique_ptr<EmbeddedCluster>> StartCluster(const AppendBenchFlags& flags,
                                                              const std::string& data_dir) {
  EmbeddedCluster::Options options;
  options.memory_bytes = flags.bytes + flags.bytes / 4 + (int64_t{64} << 20);
  options.version = EDUBA_VERSION;
  options.data_dir = data_dir;
  EDUBA_ASSIGN_OR_RETURN(auto cluster, EmbeddedCluster::Start(options));
  EDUBA_RETURN_IF_ERROR(WaitForGroup(cluster->address()).status());
  return cluster;
}

// A start that reads one append from the disk, beside reading the same files.
struct RestartResult {
  double bytes_per_s = 0;
  double disk_bytes_per_s = 0;
};

absl::StatusOr<RestartResult> MeasureRestart(const AppendBenchFlags& flags, const std::string& data_dir) {
  {
    EDUBA_ASSIGN_OR_RETURN(const auto cluster, StartCluster(flags, data_dir));
    EDUBA_RETURN_IF_ERROR(FillBenchSession(cluster->address(), flags.bytes));
  }
  EDUBA_RETURN_IF_ERROR(DropFromMemory(data_dir));
  EDUBA_ASSIGN_OR_RETURN(const ReadThrough files, ReadAll(data_dir));
  EDUBA_RETURN_IF_ERROR(DropFromMemory(data_dir));
  absl::StatusOr<std::unique_ptr<EmbeddedCluster>> cluster;
  const double seconds = Seconds([&] { cluster = StartCluster(flags, data_dir); });
  EDUBA_RETURN_IF_ERROR(cluster.status());
  const auto bytes = static_cast<double>(files.bytes);
  return RestartResult{bytes / seconds, bytes / files.seconds};
}

absl::StatusOr<AppendBenchResult> Measure(const AppendBenchFlags& flags, const std::string& data_dir) {
  EDUBA_ASSIGN_OR_RETURN(const auto cluster, StartCluster(flags, ""));
  std::unique_ptr<EmbeddedCluster> lasting;
  if (!data_dir.empty()) {
    EDUBA_ASSIGN_OR_RETURN(lasting, StartCluster(flags, data_dir));
  }
  ProgressReport report("bench append");
  AppendBenchOptions options;
  options.server = cluster->address();
  options.bytes = flags.bytes;
  options.rounds = flags.rounds;
  if (lasting != nullptr) options.lasting_server = lasting->address();
  options.data_dir = data_dir;
  options.progress = [&report](const std::string& what, int done, int total) {
    report.Parts(what, done, total);
  };
  return RunAppendBench(options);
}

void Print(const AppendBenchFlags& flags, const AppendBenchResult& result, const RestartResult& restart) {
  const double bare_rate = 1e-9 * result.stream_bytes_per_s;
  const double append_rate = 1e-9 * result.append_bytes_per_s;
  const double lasting_rate = 1e-9 * result.lasting_bytes_per_s;
  const double disk_rate = 1e-9 * result.disk_bytes_per_s;
  if (flags.json) {
    nlohmann::ordered_json json = {{"bytes", result.bytes},
                                   {"rounds", flags.rounds},
                                   {"stream_gb_per_s", bare_rate},
                                   {"append_gb_per_s", append_rate},
                                   {"share", append_rate / bare_rate}};
    if (!flags.data_dir.empty()) {
      json["lasting_append_gb_per_s"] = lasting_rate;
      json["disk_write_gb_per_s"] = disk_rate;
      json["restart_gb_per_s"] = 1e-9 * restart.bytes_per_s;
      json["disk_read_gb_per_s"] = 1e-9 * restart.disk_bytes_per_s;
    }
    return PrintJson(json);
  }
  std::cout << absl::StrFormat(
                   "append of %s, plan to commit, one worker on loopback: %.2f GB/s; the same messages to a "
                   "service that drops them: %.2f GB/s; share %.2f",
                   BytesText(result.bytes), append_rate, bare_rate, append_rate / bare_rate)
            << std::endl;
  if (flags.data_dir.empty()) return;
  std::cout << absl::StrFormat(
                   "the same kept on the disk: %.2f GB/s; a file of as many bytes, written and synced: %.2f "
                   "GB/s; share of the file's %.2f, of the append in memory %.2f",
                   lasting_rate, disk_rate, lasting_rate / disk_rate, lasting_rate / append_rate)
            << std::endl;
  std::cout << absl::StrFormat(
                   "a start that reads it again, from nothing to a group that serves: %.2f GB/s; reading the "
                   "same files: %.2f GB/s; share %.2f",
                   1e-9 * restart.bytes_per_s, 1e-9 * restart.disk_bytes_per_s,
                   restart.bytes_per_s / restart.disk_bytes_per_s)
            << std::endl;
}

absl::Status RunIn(const AppendBenchFlags& flags, const std::string& folder) {
  EDUBA_ASSIGN_OR_RETURN(const AppendBenchResult result,
                         Measure(flags, folder.empty() ? "" : absl::StrCat(folder, "/appends")));
  RestartResult restart;
  if (!folder.empty()) {
    EDUBA_ASSIGN_OR_RETURN(restart, MeasureRestart(flags, absl::StrCat(folder, "/restart")));
  }
  Print(flags, result, restart);
  return absl::OkStatus();
}

absl::Status Run(const AppendBenchFlags& flags) {
  if (flags.data_dir.empty()) return RunIn(flags, "");
  const std::string folder = absl::StrCat(flags.data_dir, "/bench-", getpid());
  absl::Status status = RunIn(flags, folder);
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return status;
}

}  // namespace

void AddAppendBench(CLI::App& bench, Command& chosen) {
  AddCommand(bench, "append", "Appends beside a bare gRPC stream of the same messages", chosen, AddOptions,
             Run);
}

}  // namespace eduba
