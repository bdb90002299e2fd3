// The coordinator over real gRPC, with workers that answer without any attention.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/attend_stream.h"
#include "coordinator/coordinator.h"
#include "coordinator/testing/fake_rank.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/group.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "rpc/channel.h"
#include "rpc/limits.h"
#include "rpc/server.h"
#include "rpc/spec.h"
#include "rpc/status.h"

namespace eduba {
namespace {

using testing::HasSubstr;

constexpr absl::Duration kTimeout = absl::Seconds(30);

void SetDeadline(grpc::ClientContext* context, absl::Duration timeout = kTimeout) {
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

// A worker with a FakeRank: one Join stream, one Pages service.
class FakeWorker final : public v1::Pages::Service {
 public:
  explicit FakeWorker(const std::string& coordinator, uint64_t fingerprint = 7) {
    server_ = *RpcServer::Start("127.0.0.1:0", {this});
    stub_ = v1::Group::NewStub(OpenChannel(coordinator));
    stream_ = stub_->Join(&context_);
    v1::WorkerMessage hello;
    hello.mutable_hello()->set_protocol(kGroupProtocol);
    hello.mutable_hello()->set_incarnation(server_->address());
    hello.mutable_hello()->set_address(server_->address());
    hello.mutable_hello()->set_node(server_->address());
    hello.mutable_hello()->set_fingerprint(fingerprint);
    hello.mutable_hello()->set_transport("local");
    stream_->Write(hello);
    reader_ = std::thread([this] { Serve(); });
    heart_ = std::thread([this] { Beat(); });
  }
  ~FakeWorker() override {
    Kill();
    reader_.join();
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
      changed_.notify_all();
    }
    heart_.join();
    server_->Shutdown(absl::ZeroDuration());
  }

  // As if the process died.
  void Kill() { context_.TryCancel(); }
  // Steps wait until they may go on.
  void Hold(bool hold) {
    const std::lock_guard lock(mutex_);
    hold_ = hold;
    changed_.notify_all();
  }
  // How the stream ended.
  absl::Status End() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return end_.has_value(); });
    return *end_;
  }

  grpc::Status Upload(grpc::ServerContext*, grpc::ServerReader<v1::UploadRequest>* reader,
                      v1::UploadResponse* response) override {
    v1::UploadRequest piece;
    while (reader->Read(&piece)) {
      const std::lock_guard lock(mutex_);
      for (int i = 0; i < piece.count(); ++i) {
        const std::string row =
            piece.keys().substr(i * piece.keys().size() / piece.count(), piece.keys().size() / piece.count());
        if (row.find('!') != std::string::npos) return ToGrpc(absl::InvalidArgumentError("a bad row"));
        const int64_t position = piece.first_position() + i;
        const auto hash = static_cast<int64_t>(std::hash<std::string>()(absl::StrCat(position, row)));
        ++rows;
        if (Owns(position)) rank_->AddRow(piece.append_id(), hash);
      }
      response->set_positions(response->positions() + piece.count());
    }
    return grpc::Status::OK;
  }

  std::atomic<int64_t> rows{0};  // uploaded, of replicas too

 private:
  // Whether the append that was begun last gives this worker the position.
  bool Owns(int64_t position) const {
    return std::any_of(begun_.owned().begin(), begun_.owned().end(), [position](const v1::Extent& extent) {
      return position >= extent.first_position() && position < extent.first_position() + extent.count();
    });
  }

  void Serve() {
    v1::GroupMessage message;
    while (stream_->Read(&message)) {
      v1::WorkerMessage answer;
      std::unique_lock lock(mutex_);
      if (message.has_form()) {
        node_.Join(message.form().cluster());
        rank_ = std::make_unique<FakeRank>(message.form().rank(), &node_);
        answer.mutable_formed()->set_epoch(message.form().epoch());
        answer.mutable_formed()->set_attempt(message.form().attempt());
      } else if (message.has_command()) {
        if (message.command().has_attend()) changed_.wait(lock, [this] { return !hold_; });
        if (message.command().has_begin_append()) begun_ = message.command().begin_append();
        *answer.mutable_result() = rank_->Answer(message.command());
      } else {
        continue;
      }
      lock.unlock();
      const std::lock_guard write(write_mutex_);
      stream_->Write(answer);
    }
    const absl::Status end = FromGrpc(stream_->Finish());
    const std::lock_guard lock(mutex_);
    end_ = end;
    changed_.notify_all();
  }
  void Beat() {
    std::unique_lock lock(mutex_);
    while (
        !changed_.wait_for(lock, std::chrono::milliseconds(kHeartbeatIntervalMs), [this] { return done_; })) {
      if (end_.has_value()) continue;
      lock.unlock();
      v1::WorkerMessage beat;
      beat.mutable_heartbeat();
      {
        const std::lock_guard write(write_mutex_);
        stream_->Write(beat);
      }
      lock.lock();
    }
  }

  std::unique_ptr<RpcServer> server_;
  grpc::ClientContext context_;
  std::unique_ptr<v1::Group::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::GroupMessage>> stream_;
  std::mutex write_mutex_;
  std::mutex mutex_;
  std::condition_variable changed_;
  FakeNode node_;
  std::unique_ptr<FakeRank> rank_;
  v1::BeginAppend begun_;
  bool hold_ = false;
  bool done_ = false;
  std::optional<absl::Status> end_;
  std::thread reader_;
  std::thread heart_;
};

// An Attend call that sends one row at a time and stays open.
class OpenCall {
 public:
  OpenCall(v1::Eduba::Stub* stub, const std::string& session, absl::Duration timeout = kTimeout) {
    SetDeadline(&context_, timeout);
    stream_ = stub->Attend(&context_);
    v1::AttendRequest request;
    request.mutable_header()->set_session(session);
    stream_->Write(request);
  }
  bool Send() {
    const float query[4] = {1, 2, 3, 4};
    v1::AttendRequest request;
    request.mutable_rows()->set_queries(query, sizeof(query));
    return stream_->Write(request);
  }
  // Sends a row and waits for its answer.
  bool Ask() {
    v1::AttendResponse response;
    return Send() && stream_->Read(&response) && response.rows().count() == 1;
  }
  // How the server ends the call, without being told that no more rows come.
  absl::Status End() {
    v1::AttendResponse response;
    while (stream_->Read(&response)) {
    }
    return FromGrpc(stream_->Finish());
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>> stream_;
};

class ServiceTest : public testing::Test {
 protected:
  void SetUp() override {
    Coordinator::Options options;
    options.listen = "127.0.0.1:0";
    options.group_size = 2;
    options.version = "test";
    auto coordinator = Coordinator::Start(options);
    ASSERT_TRUE(coordinator.ok()) << coordinator.status();
    coordinator_ = *std::move(coordinator);
    stub_ = v1::Eduba::NewStub(OpenChannel(coordinator_->address()));
  }
  void StartWorkers() {
    for (int i = 0; i < 2; ++i) workers_.push_back(std::make_unique<FakeWorker>(coordinator_->address()));
    ASSERT_TRUE(coordinator_->WaitUntilActive(absl::Now() + kTimeout).ok());
  }

  static v1::CreateSessionRequest Spec(const std::string& name) {
    v1::CreateSessionRequest request;
    request.set_name(name);
    request.mutable_spec()->set_query_heads(2);
    request.mutable_spec()->set_kv_heads(1);
    request.mutable_spec()->set_head_dim(2);
    request.mutable_spec()->set_stripe_pages(1);
    request.mutable_spec()->set_sink_tokens(4);
    return request;
  }
  absl::Status Create(const std::string& name) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::Session session;
    return FromGrpc(stub_->CreateSession(&context, Spec(name), &session));
  }
  absl::StatusOr<v1::Session> Get(const std::string& name) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::GetSessionRequest request;
    request.set_name(name);
    v1::Session session;
    const absl::Status status = FromGrpc(stub_->GetSession(&context, request, &session));
    if (!status.ok()) return status;
    return session;
  }
  // Through the coordinator, in pieces of `piece` positions with keys made of `fill`.
  absl::StatusOr<v1::AppendReceipt> Append(const std::string& name, std::optional<int64_t> at, int64_t count,
                                           int64_t piece, char fill = 'a') {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::AppendReceipt receipt;
    const auto writer = stub_->Append(&context, &receipt);
    v1::AppendRequest request;
    request.mutable_plan()->set_session(name);
    if (at.has_value()) request.mutable_plan()->set_at(*at);
    request.mutable_plan()->set_count(count);
    bool open = writer->Write(request);
    for (int64_t first = 0; open && first < count; first += piece) {
      v1::UploadRequest* upload = request.mutable_piece();
      const int64_t rows = std::min(piece, count - first);
      upload->set_first_position(at.value_or(0) + first);
      upload->set_count(static_cast<int32_t>(rows));
      upload->set_dtype(v1::DTYPE_F32);
      upload->set_keys(std::string(rows * 8, fill));
      upload->set_values(std::string(rows * 8, 'v'));
      open = writer->Write(request);
    }
    writer->WritesDone();
    const absl::Status status = FromGrpc(writer->Finish());
    if (!status.ok()) return status;
    return receipt;
  }

  struct Attended {
    std::vector<float> outputs;
    std::vector<float> lse;
    v1::AttendSummary summary;
  };
  // `rows` rows whose values are their numbers, in messages of `piece`.
  absl::StatusOr<Attended> Attend(const std::string& name, int rows, int piece,
                                  std::optional<float> poison = std::nullopt) {
    grpc::ClientContext context;
    SetDeadline(&context);
    const auto stream = stub_->Attend(&context);
    std::thread sender([&] {
      v1::AttendRequest request;
      request.mutable_header()->set_session(name);
      bool open = stream->Write(request);
      for (int first = 0; open && first < rows; first += piece) {
        std::vector<float> queries;
        for (int row = first; row < std::min(rows, first + piece); ++row) {
          for (int i = 0; i < 4; ++i) queries.push_back(static_cast<float>(row * 4 + i));
        }
        if (poison.has_value() && first + piece >= rows) queries.back() = *poison;
        request.mutable_rows()->set_queries(queries.data(), queries.size() * 4);
        open = stream->Write(request);
      }
      stream->WritesDone();
    });
    Attended result;
    bool summary = false;
    v1::AttendResponse response;
    while (stream->Read(&response)) {
      EXPECT_FALSE(summary);
      if (response.has_summary()) {
        summary = true;
        result.summary = response.summary();
        continue;
      }
      EXPECT_EQ(response.rows().first_row() * 4, static_cast<int64_t>(result.outputs.size()));
      const auto append = [](const std::string& bytes, std::vector<float>* to) {
        const size_t old = to->size();
        to->resize(old + bytes.size() / 4);
        std::memcpy(to->data() + old, bytes.data(), bytes.size());
      };
      append(response.rows().outputs(), &result.outputs);
      append(response.rows().lse(), &result.lse);
    }
    sender.join();
    const absl::Status status = FromGrpc(stream->Finish());
    EXPECT_EQ(status.ok(), summary);
    if (!status.ok()) return status;
    return result;
  }

  std::unique_ptr<Coordinator> coordinator_;
  std::unique_ptr<v1::Eduba::Stub> stub_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
};

TEST_F(ServiceTest, SaysHowManyWorkersAreMissing) {
  const absl::Status status = Create("a");
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("0 of 2 workers"));
}

TEST_F(ServiceTest, ThinAppendsReachTheOwnersAndQueriesComeBackInOrder) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  EXPECT_EQ(Create("a").code(), absl::StatusCode::kAlreadyExists);
  const auto receipt = Append("a", 0, 1000, 300);
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length(), 1000);
  EXPECT_FALSE(receipt->already_stored());
  // 256-row stripes in turn; the four sinks also go to the other worker.
  EXPECT_EQ(workers_[0]->rows + workers_[1]->rows, 1004);

  const auto again = Append("a", 0, 1000, 77);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->already_stored());
  EXPECT_EQ(again->digest_low(), receipt->digest_low());
  EXPECT_EQ(Append("a", 0, 1000, 300, 'b').status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(Append("a", 1001, 5, 300).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(Append("a", 1000, 5, 5, '!').status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Get("a")->length(), 1000);

  const auto result = Attend("a", 10000, 333);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->outputs.size(), 40000);
  for (size_t i = 0; i < result->outputs.size(); ++i) {
    ASSERT_EQ(result->outputs[i], 2.0f * static_cast<float>(i)) << i;
  }
  for (const float lse : result->lse) ASSERT_EQ(lse, 999);
  EXPECT_EQ(result->summary.rows(), 10000);
  EXPECT_EQ(result->summary.workers(), 2);
  EXPECT_EQ(result->summary.row_heads_maximum(), 10000);
  EXPECT_EQ(result->summary.row_heads_sink(), 10000);
  EXPECT_EQ(result->summary.length(), 1000);
}

TEST_F(ServiceTest, ConcurrentCallsGetTheirOwnRows) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  std::vector<std::thread> callers;
  callers.reserve(8);
  std::atomic<int> good{0};
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, rows = 1 + 700 * caller] {
      const auto result = Attend("a", rows, 50);
      ASSERT_TRUE(result.ok()) << result.status();
      ASSERT_EQ(result->outputs.size(), static_cast<size_t>(rows) * 4);
      for (size_t i = 0; i < result->outputs.size(); ++i) {
        ASSERT_EQ(result->outputs[i], 2.0f * static_cast<float>(i));
      }
      ++good;
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(good, 8);
}

TEST_F(ServiceTest, RefusesNumbersThatAreNotFinite) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  const auto result = Attend("a", 7, 3, std::numeric_limits<float>::infinity());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("row 6, head 1, index 1 is Inf"));
  EXPECT_TRUE(Attend("a", 7, 3).ok());
}

TEST_F(ServiceTest, AKilledWorkerEndsQueriesAndTheGroupComesBackWithAnother) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Create("empty").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  OpenCall call(stub_.get(), "a");
  ASSERT_TRUE(call.Ask());
  workers_[1]->Hold(true);
  ASSERT_TRUE(call.Send());
  workers_[0]->Kill();
  EXPECT_EQ(call.End().code(), absl::StatusCode::kUnavailable);
  workers_[1]->Hold(false);
  workers_[0] = std::make_unique<FakeWorker>(coordinator_->address());
  ASSERT_TRUE(coordinator_->WaitUntilActive(absl::Now() + kTimeout).ok());
  EXPECT_EQ(Attend("a", 5, 5).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(Get("a")->lost());
  EXPECT_TRUE(Append("empty", 0, 10, 10).ok());
}

TEST_F(ServiceTest, AnErrorEndsACallWhoseSenderIsSilent) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  OpenCall call(stub_.get(), "a");
  ASSERT_TRUE(call.Ask());
  workers_[1]->Kill();
  EXPECT_EQ(call.End().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ServiceTest, ACallersDeadlineEndsItsCallAndNotTheGroup) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  workers_[0]->Hold(true);
  OpenCall call(stub_.get(), "a", absl::Milliseconds(300));
  call.Send();
  EXPECT_EQ(call.End().code(), absl::StatusCode::kDeadlineExceeded);
  workers_[0]->Hold(false);
  EXPECT_TRUE(Attend("a", 5, 5).ok());
}

TEST_F(ServiceTest, RefusesAWorkerWithOtherArithmetic) {
  FakeWorker first(coordinator_->address(), 7);
  // Its refusal would be the first's if it came first: wait until the coordinator knows that one.
  for (;;) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ListWorkersResponse list;
    ASSERT_TRUE(stub_->ListWorkers(&context, {}, &list).ok());
    if (list.workers_size() == 1) break;
  }
  FakeWorker second(coordinator_->address(), 8);
  const absl::Status end = second.End();
  EXPECT_EQ(end.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(end.message()), HasSubstr("arithmetic differs"));
}

TEST_F(ServiceTest, ShutdownEndsCallsAndTellsWorkersToComeAgain) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  OpenCall call(stub_.get(), "a");
  ASSERT_TRUE(call.Ask());
  coordinator_->Shutdown(absl::ZeroDuration());
  EXPECT_EQ(call.End().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(workers_[0]->End().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(workers_[1]->End().code(), absl::StatusCode::kUnavailable);
}

TEST(CheckFiniteQueries, NamesTheValue) {
  v1::SessionSpec spec;
  spec.set_query_heads(2);
  spec.set_head_dim(3);
  std::vector<float> queries(12, 1.0f);
  const auto check = [&] {
    return CheckFiniteQueries(std::string(reinterpret_cast<const char*>(queries.data()), 48), spec, 100);
  };
  EXPECT_TRUE(check().ok());
  queries[6 + 3 + 2] = std::nanf("");
  EXPECT_THAT(std::string(check().message()), HasSubstr("row 101, head 1, index 2 is NaN"));
  queries[0] = -std::numeric_limits<float>::infinity();
  EXPECT_THAT(std::string(check().message()), HasSubstr("row 100, head 0, index 0 is Inf"));
}

}  // namespace
}  // namespace eduba
