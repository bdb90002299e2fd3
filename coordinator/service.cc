#include "coordinator/service.h"

#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "base/mutex.h"
#include "coordinator/answer_stream.h"
#include "coordinator/append_tokens_stream.h"
#include "coordinator/attend_stream.h"
#include "coordinator/join_stream.h"
#include "coordinator/proxied_append.h"
#include "coordinator/unary_call.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// A call that ends without the runtime.
grpc::ServerUnaryReactor* EndAtOnce(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

// Decodes the call's message and begins the request: `begin(state, request, message, now_ms)`.
template <typename Request, typename Begin>
grpc::ServerUnaryReactor* Ask(Runtime* runtime, grpc::CallbackServerContext* context,
                              const grpc::ByteBuffer* bytes, grpc::ByteBuffer* response, const Begin& begin) {
  Request message;
  const absl::Status decoded = DecodeOnly(*bytes, &message);
  if (!decoded.ok()) return EndAtOnce(context, decoded);
  const auto event = [&](ClusterState& state, RequestId id, int64_t now) { begin(state, id, message, now); };
  return new UnaryCall(runtime, event, response);
}

// The same for calls that are answered by a stream.
template <typename Request, typename Begin>
grpc::ServerWriteReactor<grpc::ByteBuffer>* AskForStream(Runtime* runtime, const grpc::ByteBuffer* bytes,
                                                         const Begin& begin) {
  Request message;
  const absl::Status decoded = DecodeOnly(*bytes, &message);
  if (!decoded.ok()) return new AnswerStream(decoded);
  const auto event = [&](ClusterState& state, RequestId id, int64_t now) { begin(state, id, message, now); };
  return new AnswerStream(runtime, event);
}

// One RendezvousGet call. Deletes itself when the call has ended.
class RendezvousCall final : public grpc::ServerUnaryReactor {
 public:
  RendezvousCall(RendezvousStore* store, const v1::RendezvousGetRequest& request, grpc::ByteBuffer* response)
      : store_(store), key_(request.key()) {
    const uint64_t waiter = store_->Get(request.epoch(), request.attempt(), request.key(),
                                        [this, response](absl::StatusOr<std::string> value) {
                                          v1::RendezvousGetResponse message;
                                          if (value.ok()) message.set_value(*std::move(value));
                                          *response = Encode(message);
                                          End(value.status());
                                        });
    const MutexLock lock(mutex_);
    waiter_ = waiter;
  }

  void OnCancel() override {
    uint64_t waiter = 0;
    {
      const MutexLock lock(mutex_);
      waiter = waiter_;
    }
    if (store_->Cancel(waiter)) End(absl::CancelledError("nobody has set '" + key_ + "'"));
  }
  void OnDone() override {
    // Whoever called Finish may not have let go of the mutex yet.
    { const MutexLock lock(mutex_); }
    delete this;
  }

 private:
  ~RendezvousCall() override = default;
  void End(const absl::Status& status) {
    const MutexLock lock(mutex_);
    Finish(ToGrpc(status));
  }

  RendezvousStore* const store_;
  const std::string key_;
  Mutex mutex_;
  uint64_t waiter_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

grpc::ServerUnaryReactor* EdubaService::CreateSession(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  return Ask<v1::CreateSessionRequest>(
      runtime_, context, request, response,
      [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
        state.CreateSession(id, message, absl::ToUnixMillis(absl::Now()), now);
      });
}

grpc::ServerUnaryReactor* EdubaService::GetSession(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return Ask<v1::GetSessionRequest>(runtime_, context, request, response,
                                    [](ClusterState& state, RequestId id, const auto& message,
                                       int64_t /*now*/) { state.GetSession(id, message); });
}

grpc::ServerUnaryReactor* EdubaService::ListSessions(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  return Ask<v1::ListSessionsRequest>(runtime_, context, request, response,
                                      [](ClusterState& state, RequestId id, const auto& message,
                                         int64_t /*now*/) { state.ListSessions(id, message); });
}

grpc::ServerUnaryReactor* EdubaService::DeleteSession(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  return Ask<v1::DeleteSessionRequest>(runtime_, context, request, response,
                                       [](ClusterState& state, RequestId id, const auto& message,
                                          int64_t now) { state.DeleteSession(id, message, now); });
}

grpc::ServerUnaryReactor* EdubaService::PlanAppend(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return Ask<v1::PlanAppendRequest>(runtime_, context, request, response,
                                    [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
                                      state.PlanAppend(id, message, now);
                                    });
}

grpc::ServerUnaryReactor* EdubaService::CommitAppend(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  return Ask<v1::CommitAppendRequest>(runtime_, context, request, response,
                                      [](ClusterState& state, RequestId id, const auto& message,
                                         int64_t now) { state.CommitAppend(id, message.append_id(), now); });
}

grpc::ServerUnaryReactor* EdubaService::AbortAppend(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request,
                                                    grpc::ByteBuffer* response) {
  return Ask<v1::AbortAppendRequest>(runtime_, context, request, response,
                                     [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
                                       state.AbortAppend(id, message.append_id(), now);
                                     });
}

grpc::ServerUnaryReactor* EdubaService::GetModel(grpc::CallbackServerContext* context,
                                                 const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  return Ask<v1::GetModelRequest>(runtime_, context, request, response,
                                  [](ClusterState& state, RequestId id, const auto& /*message*/,
                                     int64_t /*now*/) { state.GetModel(id); });
}

grpc::ServerUnaryReactor* EdubaService::Score(grpc::CallbackServerContext* context,
                                              const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return Ask<v1::ScoreRequest>(runtime_, context, request, response,
                               [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
                                 state.Score(id, message, now);
                               });
}

grpc::ServerUnaryReactor* EdubaService::ForkSession(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request,
                                                    grpc::ByteBuffer* response) {
  return Ask<v1::ForkSessionRequest>(runtime_, context, request, response,
                                     [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
                                       state.ForkSession(id, message, absl::ToUnixMillis(absl::Now()), now);
                                     });
}

grpc::ServerUnaryReactor* EdubaService::ListWorkers(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request,
                                                    grpc::ByteBuffer* response) {
  return Ask<v1::ListWorkersRequest>(runtime_, context, request, response,
                                     [](ClusterState& state, RequestId id, const auto& /*message*/,
                                        int64_t /*now*/) { state.ListWorkers(id); });
}

grpc::ServerReadReactor<grpc::ByteBuffer>* EdubaService::Append(grpc::CallbackServerContext* context,
                                                                grpc::ByteBuffer* response) {
  return ProxiedAppend::Start(runtime_, context, response);
}

grpc::ServerReadReactor<grpc::ByteBuffer>* EdubaService::AppendTokens(grpc::CallbackServerContext* context,
                                                                      grpc::ByteBuffer* response) {
  return new AppendTokensStream(runtime_, context, response);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* EdubaService::Generate(grpc::CallbackServerContext* /*context*/,
                                                                   const grpc::ByteBuffer* request) {
  return AskForStream<v1::GenerateRequest>(
      runtime_, request, [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
        state.Generate(id, message, now);
      });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* EdubaService::Embed(grpc::CallbackServerContext* /*context*/,
                                                                const grpc::ByteBuffer* request) {
  return AskForStream<v1::EmbedRequest>(
      runtime_, request, [](ClusterState& state, RequestId id, const auto& message, int64_t now) {
        state.Embed(id, message, now);
      });
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* EdubaService::Attend(
    grpc::CallbackServerContext* /*context*/) {
  return new AttendStream(runtime_);
}

grpc::ServerBidiReactor<v1::WorkerMessage, v1::GroupMessage>* GroupService::Join(
    grpc::CallbackServerContext* context) {
  return new JoinStream(runtime_, context);
}

grpc::ServerUnaryReactor* GroupService::RendezvousSet(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  v1::RendezvousSetRequest message;
  absl::Status status = DecodeOnly(*request, &message);
  if (status.ok()) {
    status = runtime_->rendezvous().Set(message.epoch(), message.attempt(), message.key(), message.value());
  }
  *response = Encode(v1::RendezvousSetResponse());
  return EndAtOnce(context, status);
}

grpc::ServerUnaryReactor* GroupService::RendezvousGet(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request,
                                                      grpc::ByteBuffer* response) {
  v1::RendezvousGetRequest message;
  const absl::Status decoded = DecodeOnly(*request, &message);
  if (!decoded.ok()) return EndAtOnce(context, decoded);
  return new RendezvousCall(&runtime_->rendezvous(), message, response);
}

}  // namespace eduba
