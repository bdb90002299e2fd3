// eduba bench append.

#include <algorithm>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "cli/bench.h"
#include "cli/embedded_cluster.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "cli/wait_for_group.h"
#include "client/client.h"
#include "client/upload.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "rpc/server.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

struct AppendBenchFlags {
  bool json = false;
  int64_t bytes = int64_t{256} << 20;
  int rounds = 5;
};

void AddOptions(CLI::App& command, AppendBenchFlags& options) {
  AddBytesOption(command, "--bytes", options.bytes, "Keys and values of one append [256MiB]");
  command.add_option("--rounds", options.rounds, "Timed rounds of each; medians are reported")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  AddJsonFlag(command, options.json);
}

// Receives uploads and does nothing with them: what gRPC itself costs.
class DiscardingPages : public v1::Pages::Service {
 public:
  grpc::Status Upload(grpc::ServerContext*, grpc::ServerReader<v1::UploadRequest>* reader,
                      v1::UploadResponse* response) override {
    v1::UploadRequest request;
    int64_t positions = 0;
    while (reader->Read(&request)) positions += request.count();
    response->set_positions(positions);
    return grpc::Status::OK;
  }
};

// bf16 rows that repeat: making them costs a copy, as reading a file from the page cache does.
class RepeatedRows : public RowSource {
 public:
  explicit RepeatedRows(const v1::SessionSpec& spec)
      : row_elements_(int64_t{spec.kv_heads()} * spec.head_dim()) {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    elements_.resize((kRows + kOverlap) * row_elements_);
    for (uint16_t& element : elements_) element = Bf16FromF32(normal(random));
  }

  DType dtype() const override { return DType::kBf16; }
  absl::Status Read(int /*layer*/, int64_t first, int64_t count, void* keys, void* values) const override {
    for (int64_t row = 0; row < count; row += kOverlap) {
      const int64_t part = std::min(kOverlap, count - row);
      const size_t bytes = part * row_elements_ * sizeof(uint16_t);
      const size_t offset = row * row_elements_ * sizeof(uint16_t);
      const uint16_t* from = elements_.data() + (first + row) % kRows * row_elements_;
      std::memcpy(static_cast<char*>(keys) + offset, from, bytes);
      std::memcpy(static_cast<char*>(values) + offset, from, bytes);
    }
    return absl::OkStatus();
  }

 private:
  static constexpr int64_t kRows = 16384;
  static constexpr int64_t kOverlap = 1024;  // Rows that can be copied at once from any start.

  const int64_t row_elements_;
  std::vector<uint16_t> elements_;
};

v1::SessionSpec BenchSpec() {
  v1::SessionSpec spec;
  spec.set_query_heads(4);
  spec.set_kv_heads(4);
  spec.set_head_dim(64);
  spec.set_dtype(v1::DTYPE_BF16);
  return *CompleteSpec(spec);
}

absl::StatusOr<double> Seconds(const std::function<absl::Status()>& work) {
  const absl::Time started = absl::Now();
  EDUBA_RETURN_IF_ERROR(work());
  return absl::ToDoubleSeconds(absl::Now() - started);
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

absl::Status Run(const AppendBenchFlags& flags) {
  const v1::SessionSpec spec = BenchSpec();
  const int64_t count = std::max<int64_t>(1, flags.bytes / PositionBytes(spec));
  const auto bytes = static_cast<double>(count * PositionBytes(spec));
  const RepeatedRows rows(spec);

  EmbeddedCluster::Options cluster_options;
  cluster_options.memory_bytes = flags.bytes + flags.bytes / 4 + (int64_t{64} << 20);
  cluster_options.version = EDUBA_VERSION;
  EDUBA_ASSIGN_OR_RETURN(const auto cluster, EmbeddedCluster::Start(cluster_options));
  EDUBA_RETURN_IF_ERROR(WaitForGroup(cluster->address()).status());
  Client client({cluster->address(), absl::Minutes(10)});

  DiscardingPages discard;
  EDUBA_ASSIGN_OR_RETURN(const auto bare, RpcServer::Start("127.0.0.1:0", {&discard}));
  v1::AppendPlan plan;
  plan.set_count(count);
  plan.add_workers(bare->address());
  plan.add_extents()->set_count(count);

  // The two take turns, so that a neighbour's load falls on both. The first round of each is not timed: it
  // meets memory that was never touched and connections that were never made.
  std::vector<double> bare_seconds;
  std::vector<double> append_seconds;
  {
    ProgressReport progress("bench append");
    for (int round = 0; round <= flags.rounds; ++round) {
      EDUBA_ASSIGN_OR_RETURN(const double bare_time, Seconds([&] {
                               return UploadToWorkers(spec, plan, rows, Progress(),
                                                      absl::Now() + absl::Minutes(10));
                             }));
      EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.CreateSession("bench", spec));
      EDUBA_ASSIGN_OR_RETURN(const double append_time,
                             Seconds([&] { return client.Append(session, count, rows, {}).status(); }));
      EDUBA_RETURN_IF_ERROR(client.DeleteSession("bench"));
      if (round > 0) {
        bare_seconds.push_back(bare_time);
        append_seconds.push_back(append_time);
      }
      progress.Parts("rounds", round + 1, flags.rounds + 1);
    }
  }
  const double bare_rate = bytes / Median(bare_seconds) / 1e9;
  const double append_rate = bytes / Median(append_seconds) / 1e9;
  if (flags.json) {
    PrintJson({{"bytes", static_cast<int64_t>(bytes)},
               {"rounds", flags.rounds},
               {"stream_gb_per_s", bare_rate},
               {"append_gb_per_s", append_rate},
               {"share", append_rate / bare_rate}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat(
                   "append of %s, plan to commit, one worker on loopback: %.2f GB/s; the same messages to a "
                   "service "
                   "that drops them: %.2f GB/s; share %.2f",
                   BytesText(static_cast<int64_t>(bytes)), append_rate, bare_rate, append_rate / bare_rate)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace

void AddAppendBench(CLI::App& bench, Command& chosen) {
  AddCommand(bench, "append", "Appends beside a bare gRPC stream of the same messages", chosen, AddOptions,
             Run);
}

}  // namespace eduba
