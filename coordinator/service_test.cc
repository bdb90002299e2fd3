// The coordinator over real gRPC, with workers that answer without any attention.
#include "coordinator/service.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/attend_stream.h"
#include "coordinator/coordinator.h"
#include "coordinator/store.h"
#include "coordinator/testing/fake_rank.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/group.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
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
  explicit FakeWorker(const std::string& coordinator, uint64_t fingerprint = 7,
                      const v1::Model* model = nullptr) {
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
    if (model != nullptr) *hello.mutable_hello()->mutable_model() = *model;
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

  // Ends the stream as if the worker's process had died.
  void Kill() { context_.TryCancel(); }
  // Steps wait until they may go on.
  void Hold(bool hold) {
    const std::lock_guard lock(mutex_);
    hold_ = hold;
    changed_.notify_all();
  }
  // Jobs of models end only when they are cancelled.
  void HoldJobs(bool hold) {
    const std::lock_guard lock(mutex_);
    rank_->hold_jobs = hold;
  }
  void FailNext(v1::Command::KindCase kind, const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    rank_->failures[kind] = status;
  }
  // Answers to commands of this kind are kept; KIND_NOT_SET sends those that were.
  void HoldAnswers(v1::Command::KindCase kind) {
    std::vector<v1::WorkerMessage> kept;
    {
      const std::lock_guard lock(mutex_);
      held_kind_ = kind;
      if (kind == v1::Command::KIND_NOT_SET) kept.swap(kept_);
    }
    const std::lock_guard write(write_mutex_);
    for (const v1::WorkerMessage& answer : kept) stream_->Write(answer);
  }
  // Uploads stop reading.
  void HoldUploads(bool hold) {
    const std::lock_guard lock(mutex_);
    hold_uploads_ = hold;
    changed_.notify_all();
  }
  // Waits until so many commands of this kind have come.
  void AwaitCommands(v1::Command::KindCase kind, int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return seen_[kind] >= count; });
  }
  void AwaitUploads(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return uploads_ >= count; });
  }
  // How the stream ended.
  absl::Status End() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return end_.has_value(); });
    return *end_;
  }

  grpc::Status Upload(grpc::ServerContext*, grpc::ServerReader<v1::UploadRequest>* reader,
                      v1::UploadResponse* response) override {
    {
      std::unique_lock lock(mutex_);
      ++uploads_;
      changed_.notify_all();
      changed_.wait(lock, [this] { return !hold_uploads_; });
    }
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
      std::vector<v1::WorkerMessage> answers(1);
      std::unique_lock lock(mutex_);
      if (message.has_form()) {
        v1::WorkerMessage& answer = answers[0];
        node_.Join(message.form().cluster());
        rank_ = std::make_unique<FakeRank>(message.form().rank(), &node_);
        answer.mutable_formed()->set_epoch(message.form().epoch());
        answer.mutable_formed()->set_attempt(message.form().attempt());
      } else if (message.has_command()) {
        if (message.command().has_attend()) changed_.wait(lock, [this] { return !hold_; });
        if (message.command().has_begin_append()) begun_ = message.command().begin_append();
        answers = rank_->Say(message.command());
        ++seen_[message.command().kind_case()];
        changed_.notify_all();
        if (message.command().kind_case() == held_kind_) {
          kept_.insert(kept_.end(), answers.begin(), answers.end());
          continue;
        }
      } else {
        continue;
      }
      lock.unlock();
      const std::lock_guard write(write_mutex_);
      for (const v1::WorkerMessage& answer : answers) stream_->Write(answer);
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
  bool hold_uploads_ = false;
  v1::Command::KindCase held_kind_ = v1::Command::KIND_NOT_SET;
  std::vector<v1::WorkerMessage> kept_;
  std::map<v1::Command::KindCase, int> seen_;
  int uploads_ = 0;  // that have begun
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
  void StartWorkers(const v1::Model* model = nullptr) {
    for (int i = 0; i < 2; ++i) {
      workers_.push_back(std::make_unique<FakeWorker>(coordinator_->address(), 7, model));
    }
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

TEST_F(ServiceTest, ProxiedAppendsReachTheOwnersAndQueriesComeBackInOrder) {
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

v1::Model TinyModel() {
  v1::Model model;
  model.set_name("tiny");
  model.set_hash(9);
  model.set_vocab_size(10);
  model.set_hidden_size(4);
  model.set_query_heads(2);
  model.set_kv_heads(1);
  model.set_head_dim(2);
  model.set_dtype(v1::DTYPE_F32);
  model.add_layer_windows(0);
  return model;
}

int64_t ThreadsOfThisProcess() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"),
                       std::filesystem::directory_iterator());
}

// gRPC and its timers start a few when they first need them.
constexpr int64_t kSomeThreads = 40;

// Calls that were begun without a thread for each.
class ManyCalls {
 public:
  // What a call needs until it has ended.
  struct Call {
    grpc::ClientContext context;
    grpc::Status status;
  };
  explicit ManyCalls(size_t count) : calls_(count) {
    for (Call& call : calls_) SetDeadline(&call.context, absl::Seconds(300));
  }
  ~ManyCalls() { Await(); }

  Call& operator[](size_t i) { return calls_[i]; }
  size_t size() const { return calls_.size(); }
  void Ended(size_t i, const grpc::Status& status) {
    const std::lock_guard lock(mutex_);
    calls_[i].status = status;
    ++ended_;
    changed_.notify_all();
  }
  size_t ended() {
    const std::lock_guard lock(mutex_);
    return ended_;
  }
  void Cancel() {
    for (Call& call : calls_) call.context.TryCancel();
  }
  void Await() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ == calls_.size(); });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Call> calls_;
  size_t ended_ = 0;
};

// A Generate call that reads nothing: it waits at the coordinator.
class WaitingGeneration final : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  WaitingGeneration(v1::Eduba::Stub* stub, const std::string& session, ManyCalls* calls, size_t index)
      : calls_(calls), index_(index) {
    request_.set_session(session);
    request_.set_max_tokens(5);
    // gRPC calls OnDone on other threads.
    const std::lock_guard lock(mutex_);
    stub->async()->Generate(&(*calls)[index].context, &request_, this);
    StartCall();
  }
  void OnDone(const grpc::Status& status) override {
    { const std::lock_guard lock(mutex_); }
    calls_->Ended(index_, status);
  }

 private:
  std::mutex mutex_;
  v1::GenerateRequest request_;
  ManyCalls* const calls_;
  const size_t index_;
};

// The doors over a runtime that has no workers.
class DoorsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto store = Store::Open("");
    ASSERT_TRUE(store.ok()) << store.status();
    runtime_ =
        std::make_unique<Runtime>(ClusterState::Options(), *std::move(store), StoredState(), [](bool) {});
    eduba_ = std::make_unique<EdubaService>(runtime_.get());
    group_ = std::make_unique<GroupService>(runtime_.get());
    auto server = RpcServer::Start("127.0.0.1:0", {eduba_.get(), group_.get()});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    runtime_->rendezvous().Reset(5, 2);
  }
  absl::Status ListWorkers() {
    const auto stub = v1::Eduba::NewStub(OpenChannel(server_->address()));
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ListWorkersResponse list;
    return FromGrpc(stub->ListWorkers(&context, {}, &list));
  }
  static v1::RendezvousGetRequest Get(const std::string& key) {
    v1::RendezvousGetRequest request;
    request.set_epoch(5);
    request.set_attempt(2);
    request.set_key(key);
    return request;
  }
  void AwaitWaiting(size_t count) {
    while (runtime_->rendezvous().waiting() != count) std::this_thread::yield();
  }

  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<EdubaService> eduba_;
  std::unique_ptr<GroupService> group_;
  std::unique_ptr<RpcServer> server_;
};

TEST_F(DoorsTest, AThousandWaitingCallsHoldNoThreads) {
  ASSERT_TRUE(ListWorkers().ok());
  const int64_t before = ThreadsOfThisProcess();
  ManyCalls calls(1000);
  const v1::RendezvousGetRequest request = Get("key");
  std::deque<v1::RendezvousGetResponse> responses(calls.size());
  // Ten stubs stand for ten processes.
  std::vector<std::unique_ptr<v1::Group::Stub>> stubs;
  for (int i = 0; i < 10; ++i) stubs.push_back(v1::Group::NewStub(OpenChannel(server_->address())));
  for (size_t i = 0; i < calls.size(); ++i) {
    stubs[i % stubs.size()]->async()->RendezvousGet(
        &calls[i].context, &request, &responses[i],
        [&calls, i](const grpc::Status& s) { calls.Ended(i, s); });
  }
  AwaitWaiting(calls.size());
  EXPECT_LT(ThreadsOfThisProcess() - before, kSomeThreads);
  EXPECT_TRUE(ListWorkers().ok());
  EXPECT_EQ(calls.ended(), 0);
  ASSERT_TRUE(runtime_->rendezvous().Set(5, 2, "key", "value").ok());
  calls.Await();
  for (size_t i = 0; i < calls.size(); ++i) {
    ASSERT_TRUE(calls[i].status.ok()) << calls[i].status.error_message();
    ASSERT_EQ(responses[i].value(), "value");
  }
}

TEST_F(DoorsTest, ARendezvousCallEndsWhenItIsCancelledAndWhenItsAttemptIsOver) {
  const auto stub = v1::Group::NewStub(OpenChannel(server_->address()));
  ManyCalls calls(2);
  const v1::RendezvousGetRequest request = Get("key");
  std::deque<v1::RendezvousGetResponse> responses(2);
  for (size_t i = 0; i < 2; ++i) {
    stub->async()->RendezvousGet(&calls[i].context, &request, &responses[i],
                                 [&calls, i](const grpc::Status& s) { calls.Ended(i, s); });
  }
  AwaitWaiting(2);
  calls[0].context.TryCancel();
  AwaitWaiting(1);
  runtime_->rendezvous().Reset(5, 3);
  calls.Await();
  EXPECT_EQ(calls[0].status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(calls[1].status.error_code(), grpc::StatusCode::ABORTED);
}

TEST_F(DoorsTest, AKeyThatNobodyCanSetIsNotWaitedFor) {
  const auto stub = v1::Group::NewStub(OpenChannel(server_->address()));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::RendezvousGetResponse response;
  EXPECT_EQ(stub->RendezvousGet(&context, Get(std::string(1000, 'k')), &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(DoorsTest, ShutdownEndsCallsThatWait) {
  const auto stub = v1::Group::NewStub(OpenChannel(server_->address()));
  ManyCalls calls(1);
  const v1::RendezvousGetRequest request = Get("key");
  v1::RendezvousGetResponse response;
  stub->async()->RendezvousGet(&calls[0].context, &request, &response,
                               [&calls](const grpc::Status& s) { calls.Ended(0, s); });
  AwaitWaiting(1);
  server_->Shutdown(absl::ZeroDuration());
  calls.Await();
  EXPECT_FALSE(calls[0].status.ok());
  EXPECT_EQ(runtime_->rendezvous().waiting(), 0);
}

// Takes the answer of a request that was begun by hand.
class AnswerTaker final : public Caller {
 public:
  void OnReply(absl::StatusOr<Answer> answer) override { status = answer.status(); }
  std::optional<absl::Status> status;
};

TEST_F(DoorsTest, RefusesCallsBeyondTheLimit) {
  std::deque<AnswerTaker> waiting(kCallsMax);
  std::vector<RequestId> requests;
  for (AnswerTaker& taker : waiting) {
    requests.push_back(runtime_->Start(&taker, [](ClusterState&, RequestId, int64_t) {}));
  }
  EXPECT_EQ(ListWorkers().code(), absl::StatusCode::kResourceExhausted);
  runtime_->Cancel(requests[0]);
  EXPECT_TRUE(ListWorkers().ok());
  EXPECT_FALSE(waiting[1].status.has_value());
  runtime_->Stop();
  EXPECT_EQ(waiting[1].status->code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(waiting[0].status.has_value());
}

// Calls of model sessions, of which each test says how they end.
class ModelServiceTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServiceTest::SetUp();
    const v1::Model model = TinyModel();
    StartWorkers(&model);
  }
  void CreateModelSession(const std::string& name) {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::CreateSessionRequest request;
    request.set_name(name);
    request.mutable_spec()->mutable_model();
    v1::Session session;
    const grpc::Status status = stub_->CreateSession(&context, request, &session);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  absl::Status AppendTokens(grpc::ClientContext* context, const std::string& name, int messages = 1) {
    SetDeadline(context);
    v1::AppendTokensReceipt receipt;
    const auto writer = stub_->AppendTokens(context, &receipt);
    const int32_t ids[] = {1, 2, 3};
    for (int i = 0; i < messages; ++i) {
      v1::AppendTokensRequest request;
      if (i == 0) request.set_session(name);
      request.set_ids(ids, sizeof(ids));
      if (!writer->Write(request)) break;
    }
    writer->WritesDone();
    const absl::Status status = FromGrpc(writer->Finish());
    if (status.ok()) {
      EXPECT_EQ(receipt.count(), 3 * messages);
    }
    return status;
  }
  absl::Status AppendTokens(const std::string& name, int messages = 1) {
    grpc::ClientContext context;
    return AppendTokens(&context, name, messages);
  }
  absl::Status Generate(grpc::ClientContext* context, const std::string& name, int tokens) {
    SetDeadline(context);
    v1::GenerateRequest request;
    request.set_session(name);
    request.set_max_tokens(tokens);
    const auto reader = stub_->Generate(context, request);
    v1::GenerateResponse response;
    int64_t received = 0;
    bool summary = false;
    while (reader->Read(&response)) {
      received += static_cast<int64_t>(response.tokens().ids().size() / 4);
      summary = response.has_summary();
    }
    const absl::Status status = FromGrpc(reader->Finish());
    EXPECT_EQ(status.ok(), summary);
    if (status.ok()) {
      EXPECT_EQ(received, tokens);
    }
    return status;
  }
  absl::Status Embed(grpc::ClientContext* context, const std::string& name) {
    SetDeadline(context);
    const int64_t range[] = {0, 2};
    v1::EmbedRequest request;
    request.set_session(name);
    request.set_ranges(range, sizeof(range));
    const auto reader = stub_->Embed(context, request);
    v1::EmbedResponse response;
    int count = 0;
    while (reader->Read(&response)) count += response.count();
    const absl::Status status = FromGrpc(reader->Finish());
    if (status.ok()) {
      EXPECT_EQ(count, 1);
    }
    return status;
  }
  absl::Status Score(grpc::ClientContext* context, const std::string& name) {
    SetDeadline(context);
    const int32_t id = 1;
    v1::ScoreRequest request;
    request.set_session(name);
    request.set_ids(&id, sizeof(id));
    v1::ScoreResponse response;
    return FromGrpc(stub_->Score(context, request, &response));
  }
};

TEST_F(ModelServiceTest, StreamsOfTokensArriveWhole) {
  CreateModelSession("m");
  EXPECT_EQ(AppendTokens("m", 5), absl::OkStatus());
  grpc::ClientContext generate;
  EXPECT_EQ(Generate(&generate, "m", 100), absl::OkStatus());
  grpc::ClientContext embed;
  EXPECT_EQ(Embed(&embed, "m"), absl::OkStatus());
  grpc::ClientContext score;
  EXPECT_EQ(Score(&score, "m"), absl::OkStatus());
  EXPECT_EQ(Get("m")->length(), 115);
}

TEST_F(ModelServiceTest, GenerationsThatWaitHoldNoThreads) {
  constexpr int kGenerations = 200;
  for (int i = 0; i < kGenerations; ++i) {
    CreateModelSession(absl::StrCat("m", i));
    ASSERT_EQ(AppendTokens(absl::StrCat("m", i)), absl::OkStatus());
  }
  for (const auto& worker : workers_) worker->HoldJobs(true);
  const int64_t before = ThreadsOfThisProcess();
  ManyCalls calls(kGenerations);
  std::deque<WaitingGeneration> generations;
  for (int i = 0; i < kGenerations; ++i) {
    generations.emplace_back(stub_.get(), absl::StrCat("m", i), &calls, i);
  }
  workers_[0]->AwaitCommands(v1::Command::kModelGenerate, kGenerations);
  EXPECT_LT(ThreadsOfThisProcess() - before, kSomeThreads);
  EXPECT_TRUE(Get("m0").ok());
  calls.Cancel();
  calls.Await();
  for (int i = 0; i < kGenerations; ++i) {
    ASSERT_EQ(calls[i].status.error_code(), grpc::StatusCode::CANCELLED);
  }
  workers_[0]->AwaitCommands(v1::Command::kCancelJob, kGenerations);
}

TEST_F(ModelServiceTest, ACancelledCallEndsItsJobAndNothingElse) {
  CreateModelSession("m");
  ASSERT_EQ(AppendTokens("m"), absl::OkStatus());
  const std::vector<std::pair<v1::Command::KindCase, std::function<absl::Status(grpc::ClientContext*)>>>
      kinds = {{v1::Command::kModelGenerate, [&](grpc::ClientContext* c) { return Generate(c, "m", 5); }},
               {v1::Command::kModelEmbed, [&](grpc::ClientContext* c) { return Embed(c, "m"); }},
               {v1::Command::kModelScore, [&](grpc::ClientContext* c) { return Score(c, "m"); }},
               {v1::Command::kModelAppend, [&](grpc::ClientContext* c) { return AppendTokens(c, "m"); }}};
  int cancelled = 0;
  for (const auto& [kind, call] : kinds) {
    for (const auto& worker : workers_) worker->HoldJobs(true);
    grpc::ClientContext context;
    absl::Status status;
    std::thread caller([&, &call = call] { status = call(&context); });
    workers_[0]->AwaitCommands(kind, kind == v1::Command::kModelAppend ? 5 : 1);
    context.TryCancel();
    caller.join();
    EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << kind;
    for (const auto& worker : workers_) {
      worker->AwaitCommands(v1::Command::kCancelJob, cancelled + 1);
      worker->HoldJobs(false);
    }
    ++cancelled;
    // Its session is busy until the workers have said how the job ended.
    while (absl::IsAborted(status = AppendTokens("m"))) {
    }
    EXPECT_EQ(status, absl::OkStatus()) << kind;
  }
}

// A proxied append that sends its plan and the first piece, and then neither more nor its end.
class OpenAppend {
 public:
  OpenAppend(v1::Eduba::Stub* stub, const std::string& session) {
    SetDeadline(&context_);
    writer_ = stub->Append(&context_, &receipt_);
    v1::AppendRequest request;
    request.mutable_plan()->set_session(session);
    request.mutable_plan()->set_count(100);
    writer_->Write(request);
    v1::UploadRequest* piece = request.mutable_piece();
    piece->set_count(1);
    piece->set_dtype(v1::DTYPE_F32);
    piece->set_keys("01234567");
    piece->set_values("01234567");
    writer_->Write(request);
  }
  void Cancel() { context_.TryCancel(); }
  absl::Status End() { return FromGrpc(writer_->Finish()); }

 private:
  grpc::ClientContext context_;
  v1::AppendReceipt receipt_;
  std::unique_ptr<grpc::ClientWriter<v1::AppendRequest>> writer_;
};

TEST_F(ServiceTest, ACancelledProxiedAppendLeavesNothing) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  int aborted = 0;
  for (const bool workers_are_slow : {false, true}) {
    for (const auto& worker : workers_) worker->HoldUploads(workers_are_slow);
    OpenAppend append(stub_.get(), "a");
    workers_[0]->AwaitUploads(aborted + 1);
    append.Cancel();
    EXPECT_EQ(append.End().code(), absl::StatusCode::kCancelled);
    workers_[0]->AwaitCommands(v1::Command::kAbortAppend, ++aborted);
    for (const auto& worker : workers_) worker->HoldUploads(false);
  }
  EXPECT_EQ(Append("a", 0, 10, 10)->length(), 10);
}

TEST_F(ServiceTest, ACommitGoesOnWhenItsCallerIsGone) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  workers_[1]->HoldAnswers(v1::Command::kSealAppend);
  grpc::ClientContext planning;
  SetDeadline(&planning);
  v1::PlanAppendRequest plan;
  plan.set_session("a");
  plan.set_count(1);
  v1::AppendPlan planned;
  ASSERT_TRUE(stub_->PlanAppend(&planning, plan, &planned).ok());
  v1::CommitAppendRequest commit;
  commit.set_append_id(planned.append_id());
  v1::AppendReceipt receipt;
  grpc::ClientContext context;
  SetDeadline(&context);
  absl::Status status;
  std::thread caller([&] { status = FromGrpc(stub_->CommitAppend(&context, commit, &receipt)); });
  workers_[1]->AwaitCommands(v1::Command::kSealAppend, 1);
  context.TryCancel();
  caller.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  workers_[1]->HoldAnswers(v1::Command::KIND_NOT_SET);
  grpc::ClientContext again;
  SetDeadline(&again);
  ASSERT_TRUE(stub_->CommitAppend(&again, commit, &receipt).ok());
  EXPECT_EQ(receipt.length(), 1);
}

TEST_F(ServiceTest, AProxiedAppendThatCannotBeCommittedIsAborted) {
  StartWorkers();
  ASSERT_TRUE(Create("a").ok());
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::AppendReceipt receipt;
  const auto writer = stub_->Append(&context, &receipt);
  workers_[1]->FailNext(v1::Command::kSealAppend, absl::FailedPreconditionError("rows are missing"));
  v1::AppendRequest request;
  request.mutable_plan()->set_session("a");
  request.mutable_plan()->set_count(10);
  writer->Write(request);
  writer->WritesDone();
  EXPECT_EQ(FromGrpc(writer->Finish()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Append("a", 0, 10, 10)->length(), 10);
}

TEST_F(ModelServiceTest, ShutdownEndsCallsOfEveryKind) {
  for (const std::string name : {"generate", "score", "embed", "append"}) CreateModelSession(name);
  for (const std::string name : {"generate", "score", "embed"}) {
    ASSERT_EQ(AppendTokens(name), absl::OkStatus());
  }
  ASSERT_TRUE(Create("a").ok());
  ASSERT_TRUE(Create("b").ok());
  ASSERT_TRUE(Append("a", 0, 10, 10).ok());
  for (const auto& worker : workers_) worker->HoldJobs(true);
  OpenCall attend(stub_.get(), "a");
  ASSERT_TRUE(attend.Ask());
  OpenAppend append(stub_.get(), "b");
  workers_[0]->AwaitUploads(2);
  std::vector<absl::Status> ends(4);
  std::vector<std::thread> callers;
  std::deque<grpc::ClientContext> contexts(4);
  callers.emplace_back([&] { ends[0] = Generate(&contexts[0], "generate", 5); });
  callers.emplace_back([&] { ends[1] = Score(&contexts[1], "score"); });
  callers.emplace_back([&] { ends[2] = Embed(&contexts[2], "embed"); });
  callers.emplace_back([&] { ends[3] = AppendTokens(&contexts[3], "append"); });
  for (const auto kind : {v1::Command::kModelGenerate, v1::Command::kModelScore, v1::Command::kModelEmbed}) {
    workers_[0]->AwaitCommands(kind, 1);
  }
  workers_[0]->AwaitCommands(v1::Command::kModelAppend, 4);
  coordinator_->Shutdown(absl::ZeroDuration());
  EXPECT_EQ(attend.End().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(append.End().ok());
  for (std::thread& caller : callers) caller.join();
  for (const absl::Status& end : ends) EXPECT_EQ(end.code(), absl::StatusCode::kUnavailable);
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
