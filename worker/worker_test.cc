#include "worker/worker.h"

#include <deque>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_layer_kernels.h"
#include "kernels/cuda/emulated_device.h"
#include "kernels/cuda/fake_cublaslt.h"
#include "rpc/channel.h"
#include "rpc/limits.h"
#include "rpc/placement.h"
#include "rpc/status.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

// A coordinator that does what the test tells it to.
class ScriptedCoordinator final : public v1::Group::Service {
 public:
  using Stream = grpc::ServerReaderWriter<v1::GroupMessage, v1::WorkerMessage>;

  // How the next Join streams end, before anything is said; then they stay open.
  void RefuseNext(const absl::Status& status) {
    const std::scoped_lock lock(mutex_);
    refusals_.push_back(status);
  }

  // Waits until `count` workers have said hello; their hellos in order of arrival.
  std::vector<v1::WorkerHello> Hellos(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return hellos_.size() >= count; });
    return hellos_;
  }

  void Send(size_t worker, const v1::GroupMessage& message) {
    const std::scoped_lock lock(mutex_);
    streams_.at(worker)->Write(message);
  }

  // Waits for what a worker says next, heartbeats left out.
  v1::WorkerMessage Next(size_t worker) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !said_[worker].empty(); });
    v1::WorkerMessage message = said_[worker].front();
    said_[worker].pop_front();
    return message;
  }

  void AwaitHeartbeats(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return heartbeats_ >= count; });
  }

  // Waits until a heartbeat says that rows of the append have come in.
  void AwaitTouched(uint64_t append) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return touched_.contains(append); });
  }

  void AwaitStreamsGone() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_ == 0; });
  }

  grpc::Status Join(grpc::ServerContext* /*context*/, Stream* stream) override {
    size_t index = 0;
    {
      const std::scoped_lock lock(mutex_);
      if (!refusals_.empty()) {
        const absl::Status status = refusals_.front();
        refusals_.pop_front();
        return ToGrpc(status);
      }
      ++open_;
    }
    v1::WorkerMessage message;
    while (stream->Read(&message)) {
      const std::scoped_lock lock(mutex_);
      if (message.has_hello()) {
        index = hellos_.size();
        hellos_.push_back(message.hello());
        streams_.push_back(stream);
      } else if (message.has_heartbeat()) {
        ++heartbeats_;
        touched_.insert(message.heartbeat().appends().begin(), message.heartbeat().appends().end());
      } else {
        said_[index].push_back(message);
      }
      changed_.notify_all();
    }
    const std::scoped_lock lock(mutex_);
    --open_;
    changed_.notify_all();
    return grpc::Status::OK;
  }

  grpc::Status RendezvousSet(grpc::ServerContext*, const v1::RendezvousSetRequest* request,
                             v1::RendezvousSetResponse*) override {
    const std::scoped_lock lock(mutex_);
    board_[Key(*request)] = request->value();
    changed_.notify_all();
    return grpc::Status::OK;
  }

  grpc::Status RendezvousGet(grpc::ServerContext*, const v1::RendezvousGetRequest* request,
                             v1::RendezvousGetResponse* response) override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return board_.contains(Key(*request)); });
    response->set_value(board_[Key(*request)]);
    return grpc::Status::OK;
  }

 private:
  template <typename Request>
  static std::string Key(const Request& request) {
    return std::to_string(request.epoch()) + "/" + std::to_string(request.attempt()) + "/" + request.key();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<absl::Status> refusals_;
  std::vector<v1::WorkerHello> hellos_;
  std::vector<Stream*> streams_;
  std::map<size_t, std::deque<v1::WorkerMessage>> said_;
  std::map<std::string, std::string> board_;
  int heartbeats_ = 0;
  std::set<uint64_t> touched_;
  int open_ = 0;
};

class WorkerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto server = RpcServer::Start("127.0.0.1:0", {&coordinator_});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  void TearDown() override {
    workers_.clear();
    server_->Shutdown(absl::ZeroDuration());
  }

  Worker& StartWorker(LocalHub* hub, Worker::Options options = {}) {
    options.coordinator = server_->address();
    options.memory_bytes = int64_t{4} << 20;
    options.backend = "reference";
    options.version = "test";
    options.hub = hub;
    auto worker = Worker::Start(options);
    EXPECT_TRUE(worker.ok()) << worker.status();
    workers_.push_back(*std::move(worker));
    return *workers_.back();
  }

  static v1::GroupMessage FormMessage(int rank, int size) {
    v1::GroupMessage message;
    message.mutable_form()->set_epoch(5);
    message.mutable_form()->set_attempt(2);
    message.mutable_form()->set_rank(rank);
    message.mutable_form()->set_size(size);
    message.mutable_form()->set_timeout_ms(30000);
    for (int i = 0; i < size; ++i) message.mutable_form()->add_nodes(absl::StrCat("node-", i));
    return message;
  }

  // Health of the worker's whole server, asked for by hand: Debian's gRPC brings no generated code for it.
  static bool IsServing(const std::string& address) {
    grpc::GenericStub stub(OpenChannel(address));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    grpc::CompletionQueue queue;
    const auto call =
        stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::ByteBuffer(nullptr, 0), &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue.Next(&tag, &ok));
    EXPECT_TRUE(status.ok()) << status.error_message();
    std::vector<grpc::Slice> slices;
    EXPECT_TRUE(response.Dump(&slices).ok());
    std::string bytes;
    for (const grpc::Slice& slice : slices) {
      bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
    }
    return bytes == "\x08\x01";  // HealthCheckResponse{status: SERVING}
  }

  LocalHub hub_;
  ScriptedCoordinator coordinator_;
  std::unique_ptr<RpcServer> server_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

TEST_F(WorkerTest, SaysWhoItIsAndThatItLives) {
  const Worker& worker = StartWorker(&hub_);
  const v1::WorkerHello hello = coordinator_.Hellos(1)[0];
  EXPECT_EQ(hello.protocol(), kGroupProtocol);
  EXPECT_EQ(hello.version(), "test");
  EXPECT_EQ(hello.address(), worker.address());
  EXPECT_EQ(hello.backend(), "reference");
  EXPECT_EQ(hello.memory_bytes(), 4 << 20);
  EXPECT_EQ(hello.transport(), "local");
  EXPECT_FALSE(hello.incarnation().empty());
  EXPECT_FALSE(hello.node().empty());
  EXPECT_NE(hello.fingerprint(), 0u);
  coordinator_.AwaitHeartbeats(2);
}

TEST_F(WorkerTest, ServesOnlyInAGroup) {
  const Worker& worker = StartWorker(&hub_);
  coordinator_.Hellos(1);
  EXPECT_FALSE(IsServing(worker.address()));
  coordinator_.Send(0, FormMessage(0, 1));
  EXPECT_EQ(coordinator_.Next(0).formed().code(), 0);
  EXPECT_TRUE(IsServing(worker.address()));
  v1::GroupMessage abort;
  abort.mutable_abort()->set_epoch(5);
  coordinator_.Send(0, abort);
  v1::GroupMessage command;
  command.mutable_command()->set_epoch(5);
  command.mutable_command()->set_ordinal(1);
  coordinator_.Send(0, command);
  EXPECT_EQ(static_cast<absl::StatusCode>(coordinator_.Next(0).result().code()), absl::StatusCode::kAborted);
  EXPECT_FALSE(IsServing(worker.address()));
}

TEST_F(WorkerTest, WorkersOfSeveralProcessesMeetAtTheRendezvousStore) {
  StartWorker(nullptr);
  StartWorker(nullptr);
  const auto hellos = coordinator_.Hellos(2);
  EXPECT_EQ(hellos[0].transport(), "gloo");
  EXPECT_NE(hellos[0].incarnation(), hellos[1].incarnation());
  EXPECT_EQ(hellos[0].fingerprint(), hellos[1].fingerprint());
  for (int rank = 0; rank < 2; ++rank) coordinator_.Send(rank, FormMessage(rank, 2));
  for (int rank = 0; rank < 2; ++rank) {
    const v1::GroupFormed formed = coordinator_.Next(rank).formed();
    EXPECT_EQ(formed.code(), 0) << formed.message();
    EXPECT_EQ(formed.epoch(), 5u);
    EXPECT_EQ(formed.attempt(), 2u);
  }
}

TEST_F(WorkerTest, IsTheSameNodeInAnotherProcess) {
  Worker::Options options;
  options.data_dir = ::testing::TempDir() + "/worker_test_node";
  std::filesystem::remove_all(options.data_dir);
  StartWorker(&hub_, options);
  const v1::WorkerHello first = coordinator_.Hellos(1)[0];
  workers_.clear();
  StartWorker(&hub_, options);
  const v1::WorkerHello second = coordinator_.Hellos(2)[1];
  EXPECT_EQ(second.node(), first.node());
  EXPECT_NE(second.incarnation(), first.incarnation());

  options.coordinator = server_->address();
  options.memory_bytes = 1 << 20;
  EXPECT_EQ(Worker::Start(options).status().code(), absl::StatusCode::kFailedPrecondition);
  options.data_dir.clear();
  options.node = "given";
  StartWorker(&hub_, options);
  EXPECT_EQ(coordinator_.Hellos(3)[2].node(), "given");
  std::filesystem::remove_all(::testing::TempDir() + "/worker_test_node");
}

TEST_F(WorkerTest, ARefusalForGoodEndsIt) {
  coordinator_.RefuseNext(absl::FailedPreconditionError("its arithmetic differs"));
  const absl::Status status = StartWorker(&hub_).Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("its arithmetic differs"));
}

TEST_F(WorkerTest, ComesAgainWhenItIsToldTo) {
  coordinator_.RefuseNext(absl::UnavailableError("the group is complete"));
  StartWorker(&hub_);
  EXPECT_EQ(coordinator_.Hellos(1).size(), 1u);
}

TEST_F(WorkerTest, UploadsGoToTheirAppendAndErrorsComeBack) {
  const Worker& worker = StartWorker(&hub_);
  coordinator_.Hellos(1);
  coordinator_.Send(0, FormMessage(0, 1));
  coordinator_.Next(0);
  uint64_t ordinal = 0;
  const auto run = [&](v1::Command command) {
    command.set_epoch(5);
    command.set_ordinal(++ordinal);
    command.set_timeout_ms(10000);
    v1::GroupMessage message;
    *message.mutable_command() = command;
    coordinator_.Send(0, message);
    return coordinator_.Next(0).result();
  };
  v1::Command open;
  open.mutable_open_session()->set_session_id(1);
  open.mutable_open_session()->mutable_spec()->set_query_heads(1);
  open.mutable_open_session()->mutable_spec()->set_kv_heads(1);
  open.mutable_open_session()->mutable_spec()->set_head_dim(1);
  *open.mutable_open_session()->mutable_placement() = PlacementToProto({.nodes = {"node-0"}});
  ASSERT_EQ(run(open).code(), 0);
  v1::Command begin;
  begin.mutable_begin_append()->set_append_id(3);
  begin.mutable_begin_append()->set_session_id(1);
  begin.mutable_begin_append()->set_count(20);
  begin.mutable_begin_append()->add_owned()->set_count(20);
  ASSERT_EQ(run(begin).code(), 0);

  const auto stub = v1::Pages::NewStub(OpenChannel(worker.address()));
  const auto upload = [&](uint64_t append_id, int64_t first, int pieces, v1::UploadResponse& response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    const auto writer = stub->Upload(&context, &response);
    for (int i = 0; i < pieces; ++i) {
      v1::UploadRequest request;
      request.set_append_id(append_id);
      request.set_first_position(first + 5 * i);
      request.set_count(5);
      request.set_dtype(v1::DTYPE_F32);
      request.set_keys(std::string(20, '\0'));
      request.set_values(std::string(20, '\0'));
      if (!writer->Write(request)) break;
    }
    writer->WritesDone();
    return FromGrpc(writer->Finish());
  };
  v1::UploadResponse response;
  EXPECT_EQ(upload(3, 0, 3, response), absl::OkStatus());
  EXPECT_EQ(response.positions(), 15);
  coordinator_.AwaitTouched(3);  // Else it would be taken for given up.
  EXPECT_EQ(upload(4, 15, 1, response).code(), absl::StatusCode::kNotFound);
  v1::Command seal;
  seal.mutable_seal_append()->set_append_id(3);
  EXPECT_THAT(run(seal).message(), HasSubstr("position 15 of layer 0 has not been uploaded"));
  EXPECT_EQ(upload(3, 0, 1, response).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(run(seal).message(), HasSubstr("position 0 of layer 0 was sent twice"));
}

TEST_F(WorkerTest, AWorkerWhoseDeviceFailsLeavesForGood) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  auto device = cuda::MakeEmulatedDevice(int64_t{1} << 30);
  cuda::Device& gpu = *device;
  Worker::Options options;
  options.make_backend = [&device] {
    CudaOptions cuda;
    cuda.partial_bytes = int64_t{1} << 20;
    return MakeCudaBackendOn(std::move(device), cuda);
  };
  Worker& worker = StartWorker(&hub_, options);
  EXPECT_EQ(coordinator_.Hellos(1)[0].backend(), "cuda:emulated");
  coordinator_.AwaitHeartbeats(1);
  cuda::BreakEmulatedDevice(gpu, 0);
  const absl::Status ended = worker.Wait();
  EXPECT_EQ(ended.code(), absl::StatusCode::kUnavailable) << ended;
  EXPECT_THAT(std::string(ended.message()), HasSubstr("left its group"));
  coordinator_.AwaitStreamsGone();
}

// Workers whose layers have other bits must not meet: they say another fingerprint, and what they compute
// with.
TEST_F(WorkerTest, AModelsLayersOnAGpuAreInWhatItSays) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  Worker::Options options;
  options.model = std::string(EDUBA_GOLDEN_MODELS) + "/llama";
  StartWorker(&hub_, options);
  v1::WorkerHello plain = coordinator_.Hellos(1)[0];
  EXPECT_EQ(plain.backend(), "reference");
  std::set<uint64_t> fingerprints = {plain.fingerprint()};
  for (const Activations activations : {Activations::kF32, Activations::kBf16}) {
    options.make_layers = [activations] {
      return MakeCudaLayerKernelsWith(cuda::MakeEmulatedDevice(int64_t{1} << 30), cuda::FakeCublasLtApi(),
                                      activations);
    };
    StartWorker(&hub_, options);
    const v1::WorkerHello hello = coordinator_.Hellos(workers_.size()).back();
    EXPECT_EQ(hello.backend(),
              absl::StrCat("reference+cuda:emulated", activations == Activations::kBf16 ? "/bf16" : "",
                           ", cuBLASLt 999900 on cuda:emulated"));
    fingerprints.insert(hello.fingerprint());
  }
  EXPECT_EQ(fingerprints.size(), 3u);
}

TEST_F(WorkerTest, ShutdownLeavesTheCoordinator) {
  Worker& worker = StartWorker(&hub_);
  coordinator_.Hellos(1);
  worker.Shutdown(absl::ZeroDuration());
  EXPECT_EQ(worker.Wait(), absl::OkStatus());
  coordinator_.AwaitStreamsGone();
}

TEST(WorkerOptions, AreChecked) {
  const auto start = [](auto change) {
    Worker::Options options;
    options.coordinator = "127.0.0.1:1";
    options.memory_bytes = 1 << 20;
    change(options);
    return Worker::Start(options).status();
  };
  EXPECT_EQ(start([](Worker::Options& o) { o.memory_bytes = 0; }).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.threads = 0; }).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.backend = "gpu"; }).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.backend = "cuda:4711"; }).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(start([](Worker::Options& o) { o.precision = "roughly"; }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.precision = "tensor"; }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.transport = "smoke"; }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.transport = "nccl"; }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.coordinator = "nowhere"; }).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(start([](Worker::Options& o) { o.listen = "x"; }).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace eduba
