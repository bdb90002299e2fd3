#include "benchmarks/measure/append.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "benchmarks/measure/disk.h"
#include "client/client.h"
#include "client/upload.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "rpc/server.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

constexpr absl::Duration kTimeout = absl::Minutes(10);

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

absl::StatusOr<double> BareUpload(const v1::SessionSpec& spec, const v1::AppendPlan& plan,
                                  const RowSource& rows) {
  absl::Status status;
  const double seconds =
      Seconds([&] { status = UploadToWorkers(spec, plan, rows, Progress(), absl::Now() + kTimeout); });
  EDUBA_RETURN_IF_ERROR(status);
  return seconds;
}

absl::StatusOr<double> AppendToNewSession(Client& client, const v1::SessionSpec& spec, int64_t count,
                                          const RowSource& rows) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.CreateSession("bench", spec));
  absl::Status status;
  const double seconds = Seconds([&] { status = client.Append(session, count, rows, {}).status(); });
  EDUBA_RETURN_IF_ERROR(status);
  EDUBA_RETURN_IF_ERROR(client.DeleteSession("bench"));
  return seconds;
}

int64_t PositionsIn(int64_t bytes, const v1::SessionSpec& spec) {
  return std::max<int64_t>(1, bytes / PositionBytes(spec));
}

}  // namespace

absl::StatusOr<AppendBenchResult> RunAppendBench(const AppendBenchOptions& options) {
  const v1::SessionSpec spec = BenchSpec();
  const int64_t count = PositionsIn(options.bytes, spec);
  const int64_t bytes = count * PositionBytes(spec);
  const RepeatedRows rows(spec);
  Client client({options.server, kTimeout});
  const bool lasts = !options.lasting_server.empty();
  Client lasting({lasts ? options.lasting_server : options.server, kTimeout});

  DiscardingPages discard;
  EDUBA_ASSIGN_OR_RETURN(const auto bare, RpcServer::Start("127.0.0.1:0", {&discard}));
  v1::AppendPlan plan;
  plan.set_count(count);
  plan.add_workers(bare->address());
  plan.add_extents()->set_count(count);

  // The first round is not timed: it meets memory that was never touched and connections that were never
  // made.
  std::vector<double> bare_seconds;
  std::vector<double> append_seconds;
  std::vector<double> lasting_seconds;
  std::vector<double> disk_seconds;
  for (int round = 0; round <= options.rounds; ++round) {
    EDUBA_ASSIGN_OR_RETURN(const double bare_time, BareUpload(spec, plan, rows));
    EDUBA_ASSIGN_OR_RETURN(const double append_time, AppendToNewSession(client, spec, count, rows));
    double lasting_time = 1;
    double disk_time = 1;
    if (lasts) {
      EDUBA_ASSIGN_OR_RETURN(lasting_time, AppendToNewSession(lasting, spec, count, rows));
      EDUBA_ASSIGN_OR_RETURN(disk_time, WriteAndSync(options.data_dir, bytes));
    }
    if (round > 0) {
      bare_seconds.push_back(bare_time);
      append_seconds.push_back(append_time);
      lasting_seconds.push_back(lasting_time);
      disk_seconds.push_back(disk_time);
    }
    if (options.progress) options.progress("rounds", round + 1, options.rounds + 1);
  }
  AppendBenchResult result;
  const auto rate = [bytes](const std::vector<double>& seconds) {
    return static_cast<double>(bytes) / Median(seconds);
  };
  result.bytes = bytes;
  result.stream_bytes_per_s = rate(bare_seconds);
  result.append_bytes_per_s = rate(append_seconds);
  if (lasts) {
    result.lasting_bytes_per_s = rate(lasting_seconds);
    result.disk_bytes_per_s = rate(disk_seconds);
  }
  return result;
}

absl::Status FillBenchSession(const std::string& server, int64_t bytes) {
  const v1::SessionSpec spec = BenchSpec();
  Client client({server, kTimeout});
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.CreateSession("bench", spec));
  return client.Append(session, PositionsIn(bytes, spec), RepeatedRows(spec), {}).status();
}

}  // namespace eduba
