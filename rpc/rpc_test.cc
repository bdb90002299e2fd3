#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <latch>
#include <limits>
#include <string>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "rpc/channel.h"
#include "rpc/limits.h"
#include "rpc/raw.h"
#include "rpc/server.h"
#include "rpc/spec.h"
#include "rpc/status.h"
#include "rpc/task_threads.h"

namespace {
// Connections that are to fail, and those that were asked for.
std::atomic<int> failing_connects{0};
std::atomic<int> connects{0};
}  // namespace

// In place of libc's, for gRPC too.
extern "C" int connect(int socket, const sockaddr* address, socklen_t length) {
  int type = 0;
  socklen_t size = sizeof(type);
  getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size);
  if (type == SOCK_STREAM) {
    ++connects;
    if (failing_connects-- > 0) {
      errno = ENOENT;
      return -1;
    }
  }
  return static_cast<int>(syscall(SYS_connect, socket, address, length));
}

namespace eduba {
namespace {

v1::SessionSpec SmallSpec() {
  v1::SessionSpec spec;
  spec.set_query_heads(4);
  spec.set_kv_heads(2);
  spec.set_head_dim(16);
  return spec;
}

TEST(CompleteSpec, FillsInTheDocumentedDefaults) {
  const auto spec = CompleteSpec(SmallSpec());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->layers(), 1);
  EXPECT_EQ(spec->value_dim(), 16);
  EXPECT_EQ(spec->dtype(), v1::DTYPE_F32);
  EXPECT_EQ(spec->stripe_pages(), 64);
  EXPECT_EQ(spec->scale(), 0.25f);
  EXPECT_EQ(spec->sink_logits_size(), 0);
  EXPECT_EQ(PositionBytes(*spec), 4 * 2 * (16 + 16));
}

TEST(CompleteSpec, GivesOneSinkLogitToEveryQueryHead) {
  v1::SessionSpec spec = SmallSpec();
  spec.add_sink_logits(-2.5f);
  const auto complete = CompleteSpec(spec);
  ASSERT_TRUE(complete.ok());
  ASSERT_EQ(complete->sink_logits_size(), 4);
  EXPECT_EQ(complete->sink_logits(3), -2.5f);
}

TEST(CompleteSpec, KeepsAScaleOfZero) {
  v1::SessionSpec spec = SmallSpec();
  spec.set_scale(0);
  EXPECT_EQ(CompleteSpec(spec)->scale(), 0.0f);
}

TEST(CompleteSpec, NamesTheFieldThatIsWrong) {
  const auto expect_refused = [](auto change, const std::string& named) {
    v1::SessionSpec spec = SmallSpec();
    change(spec);
    const auto result = CompleteSpec(spec);
    ASSERT_FALSE(result.ok()) << named;
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(absl::StrContains(std::string(result.status().message()), named)) << result.status();
  };
  expect_refused([](auto& s) { s.set_query_heads(5); }, "multiple of kv_heads");
  expect_refused([](auto& s) { s.set_query_heads(0); }, "query_heads is 0");
  expect_refused([](auto& s) { s.set_kv_heads(-1); }, "kv_heads is -1");
  expect_refused([](auto& s) { s.set_head_dim(1025); }, "head_dim is 1025");
  expect_refused([](auto& s) { s.set_value_dim(-3); }, "value_dim is -3");
  expect_refused([](auto& s) { s.set_layers(-1); }, "layers is -1");
  expect_refused([](auto& s) { s.set_dtype(static_cast<v1::DType>(9)); }, "dtype 9");
  expect_refused([](auto& s) { s.set_sink_tokens(-1); }, "sink_tokens");
  expect_refused([](auto& s) { s.set_window(-1); }, "window");
  expect_refused([](auto& s) { s.set_stripe_pages(-1); }, "stripe_pages");
  expect_refused([](auto& s) { s.set_scale(std::nanf("")); }, "scale");
  expect_refused([](auto& s) { s.set_softcap(-1); }, "softcap");
  expect_refused([](auto& s) { s.add_sink_logits(std::numeric_limits<float>::infinity()); }, "sink logit");
  expect_refused([](auto& s) { s.add_sink_logits(0), s.add_sink_logits(0); }, "sink_logits has 2");
  expect_refused([](auto& s) { s.set_notes(std::string(kNotesBytesMax + 1, 'x')); }, "notes");
  expect_refused([](auto& s) { s.set_query_heads(1024), s.set_head_dim(1024); }, "query_heads * max");
}

TEST(EveryLayerSeesAWindow, AsksThePolicyAndEveryLayer) {
  v1::SessionSpec spec;
  v1::Model model;
  model.add_layer_windows(5);
  spec.mutable_model()->set_policy(v1::MODEL_POLICY_STAR);
  EXPECT_TRUE(EveryLayerSeesAWindow(spec, model));
  model.add_layer_windows(0);
  EXPECT_FALSE(EveryLayerSeesAWindow(spec, model));
  spec.mutable_model()->set_policy(v1::MODEL_POLICY_MODEL);
  EXPECT_FALSE(EveryLayerSeesAWindow(spec, model));
  spec.mutable_model()->set_policy(v1::MODEL_POLICY_STREAMING);
  EXPECT_TRUE(EveryLayerSeesAWindow(spec, model));
}

TEST(SessionName, AllowsOnlyPlainNames) {
  EXPECT_TRUE(ValidateSessionName("atlas_68k.v2-b").ok());
  for (const std::string& name : {std::string(), std::string(129, 'a'), std::string("a/b"),
                                  std::string("a b"), std::string("a\0b", 3), std::string("\xc3\xa9")}) {
    EXPECT_FALSE(ValidateSessionName(name).ok()) << name;
  }
}

TEST(Status, SurvivesTheWire) {
  const absl::Status status = absl::OutOfRangeError("at is 7, the session has 5 positions");
  EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_LE(ToGrpc(absl::InternalError(std::string(100000, 'x'))).error_message().size(), 1024);
}

TEST(Raw, ABrokenMessageIsAnErrorAndAnEmptyOneIsNot) {
  v1::GetSessionRequest request;
  request.set_name("a name");
  grpc::ByteBuffer bytes = Encode(request);
  v1::GetSessionRequest copy;
  EXPECT_EQ(Decode(&bytes, &copy), absl::OkStatus());
  EXPECT_EQ(copy.name(), "a name");
  bytes = Encode(v1::GetSessionRequest());
  EXPECT_EQ(Decode(&bytes, &copy), absl::OkStatus());
  EXPECT_EQ(copy.name(), "");
  const std::string whole = request.SerializeAsString();
  for (const std::string& broken : {whole.substr(0, whole.size() - 1), std::string("\xff\xff")}) {
    const grpc::Slice slice(broken);
    bytes = grpc::ByteBuffer(&slice, 1);
    const absl::Status status = Decode(&bytes, &copy);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(absl::StrContains(status.message(), "is not a whole eduba.v1.GetSessionRequest")) << status;
  }
}

TEST(Raw, ACallNeedsAMessageAndAnEmptyOneIsOne) {
  v1::GetModelRequest request;
  const absl::Status none = DecodeOnly(grpc::ByteBuffer(), &request);
  EXPECT_EQ(none.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(none.message(), "no message, wanted one eduba.v1.GetModelRequest")) << none;
  const grpc::ByteBuffer empty = Encode(request);
  EXPECT_EQ(DecodeOnly(empty, &request), absl::OkStatus());
  EXPECT_TRUE(empty.Valid());  // The caller's bytes stay.
}

TEST(TaskThreads, RunTasksThatWaitForEachOtherAndEndWhenAllHaveRun) {
  std::latch met(2);
  std::atomic<int> run{0};
  {
    TaskThreads threads(2);
    for (int i = 0; i < 2; ++i) {
      threads.Add([&] {
        met.arrive_and_wait();
        threads.Add([&] { ++run; });
        ++run;
      });
    }
    met.wait();
    for (int i = 0; i < 100; ++i) threads.Add([&] { ++run; });
  }
  EXPECT_EQ(run, 104);
}

TEST(Address, NeedsAHostAndAPort) {
  EXPECT_EQ(ParseAddress("127.0.0.1:70")->second, 70);
  EXPECT_EQ(ParseAddress("[::1]:70")->first, "[::1]");
  for (const char* bad : {"", "host", ":70", "host:", "host:x", "host:70x", "host:65536", "host:-1"}) {
    EXPECT_FALSE(ParseAddress(bad).ok()) << bad;
  }
}

// Answers ListWorkers, counts the bytes of names it is given.
class Stub : public v1::Eduba::Service {
 public:
  grpc::Status GetSession(grpc::ServerContext*, const v1::GetSessionRequest* request,
                          v1::Session* session) override {
    session->set_length(static_cast<int64_t>(request->name().size()));
    return grpc::Status::OK;
  }
};

class ServerTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = RpcServer::Start("127.0.0.1:0", {&service_});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = v1::Eduba::NewStub(OpenChannel(server_->address()));
  }

  absl::StatusOr<int64_t> Echo(int64_t bytes, grpc_compression_algorithm compression = GRPC_COMPRESS_NONE) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    context.set_compression_algorithm(compression);
    v1::GetSessionRequest request;
    request.set_name(std::string(bytes, 'x'));
    v1::Session session;
    const absl::Status status = FromGrpc(stub_->GetSession(&context, request, &session));
    if (!status.ok()) return status;
    return session.length();
  }

  Stub service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<v1::Eduba::Stub> stub_;
};

TEST_F(ServerTest, RefusesAMessageOverTheLimitAndServesOn) {
  EXPECT_EQ(*Echo(kMessageBytesMax - 100), kMessageBytesMax - 100);
  EXPECT_EQ(Echo(kMessageBytesMax + 1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(*Echo(3), 3);
}

TEST_F(ServerTest, RefusesCompressedMessages) {
  const absl::Status refused = Echo(1 << 19, GRPC_COMPRESS_GZIP).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnimplemented);
  EXPECT_TRUE(absl::StrContains(refused.message(), "ompression algorithm 'gzip' is disabled")) << refused;
  EXPECT_EQ(*Echo(3), 3);
}

TEST_F(ServerTest, ConnectTriesASecondTime) {
  for (const int failures : {0, 1}) {
    connects = 0;
    failing_connects = failures;
    stub_ = v1::Eduba::NewStub(Connect(server_->address(), absl::Now() + absl::Seconds(20)));
    EXPECT_EQ(*Echo(3), 3);
    EXPECT_EQ(connects, failures + 1);
  }
}

TEST_F(ServerTest, ConnectGivesUpAndTheCallSaysWhy) {
  failing_connects = std::numeric_limits<int>::max();
  stub_ = v1::Eduba::NewStub(Connect(server_->address(), absl::Now() + absl::Seconds(20)));
  EXPECT_EQ(Echo(3).status().code(), absl::StatusCode::kUnavailable);
  failing_connects = 0;
}

TEST_F(ServerTest, RefusesAPortThatIsTaken) {
  Stub other;
  EXPECT_EQ(RpcServer::Start(server_->address(), {&other}).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace eduba
