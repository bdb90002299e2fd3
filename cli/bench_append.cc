// eduba bench append.

#include <iostream>
#include <string>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "benchmarks/measure/append.h"
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
};

void AddOptions(CLI::App& command, AppendBenchFlags& options) {
  AddBytesOption(command, "--bytes", options.bytes, "Keys and values of one append [256MiB]");
  command.add_option("--rounds", options.rounds, "Timed rounds of each; medians are reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  AddJsonFlag(command, options.json);
}

absl::Status Run(const AppendBenchFlags& flags) {
  EmbeddedCluster::Options cluster_options;
  cluster_options.memory_bytes = flags.bytes + flags.bytes / 4 + (int64_t{64} << 20);
  cluster_options.version = EDUBA_VERSION;
  EDUBA_ASSIGN_OR_RETURN(const auto cluster, EmbeddedCluster::Start(cluster_options));
  EDUBA_RETURN_IF_ERROR(WaitForGroup(cluster->address()).status());
  AppendBenchResult result;
  {
    ProgressReport report("bench append");
    AppendBenchOptions options{cluster->address(), flags.bytes, flags.rounds, {}};
    options.progress = [&report](const std::string& what, int done, int total) {
      report.Parts(what, done, total);
    };
    EDUBA_ASSIGN_OR_RETURN(result, RunAppendBench(options));
  }
  const double bare_rate = 1e-9 * result.stream_bytes_per_s;
  const double append_rate = 1e-9 * result.append_bytes_per_s;
  if (flags.json) {
    PrintJson({{"bytes", result.bytes},
               {"rounds", flags.rounds},
               {"stream_gb_per_s", bare_rate},
               {"append_gb_per_s", append_rate},
               {"share", append_rate / bare_rate}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat(
                   "append of %s, plan to commit, one worker on loopback: %.2f GB/s; the same messages to a "
                   "service that drops them: %.2f GB/s; share %.2f",
                   BytesText(result.bytes), append_rate, bare_rate, append_rate / bare_rate)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace

void AddAppendBench(CLI::App& bench, Command& chosen) {
  AddCommand(bench, "append", "Appends beside a bare gRPC stream of the same messages", chosen, AddOptions,
             Run);
}

}  // namespace eduba
