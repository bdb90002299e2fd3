#include "coordinator/service.h"

#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/answer_queue.h"
#include "coordinator/attend_stream.h"
#include "coordinator/join_stream.h"
#include "coordinator/thin_upload.h"
#include "grpcpp/support/method_handler.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// Waits for the request that `event` begins; the answer's alternative must be T.
template <typename T>
absl::Status Ask(Runtime* runtime, const grpc::ServerContext* context, const Runtime::Event& event,
                 T* response) {
  absl::StatusOr<Answer> answer = runtime->Call(event, [context] { return context->IsCancelled(); });
  if (!answer.ok()) return answer.status();
  *response = std::get<T>(*std::move(answer));
  return absl::OkStatus();
}

absl::Status Abort(Runtime* runtime, uint64_t append_id) {
  const auto event = [append_id](ClusterState& state, RequestId id, int64_t now) {
    state.AbortAppend(id, append_id, now);
  };
  // Also when the caller has gone.
  return runtime->Call(event, [] { return false; }).status();
}

absl::Status Commit(Runtime* runtime, const grpc::ServerContext* context, uint64_t append_id,
                    v1::AppendReceipt* receipt) {
  const auto event = [append_id](ClusterState& state, RequestId id, int64_t now) {
    state.CommitAppend(id, append_id, now);
  };
  return Ask(runtime, context, event, receipt);
}

}  // namespace

EdubaService::EdubaService(Runtime* runtime) : runtime_(runtime) {
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Eduba.Append"),
      new grpc::internal::ClientStreamingHandler<EdubaService, grpc::ByteBuffer, v1::AppendReceipt>(
          [](EdubaService* self, grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
             v1::AppendReceipt* response) { return self->AppendEncoded(context, reader, response); },
          this));
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Eduba.AppendTokens"),
      new grpc::internal::ClientStreamingHandler<EdubaService, grpc::ByteBuffer, v1::AppendTokensReceipt>(
          [](EdubaService* self, grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
             v1::AppendTokensReceipt* response) {
            return self->AppendTokensEncoded(context, reader, response);
          },
          this));
  DecodeUnary("CreateSession", &EdubaService::CreateSession);
  DecodeUnary("GetSession", &EdubaService::GetSession);
  DecodeUnary("ListSessions", &EdubaService::ListSessions);
  DecodeUnary("DeleteSession", &EdubaService::DeleteSession);
  DecodeUnary("ForkSession", &EdubaService::ForkSession);
  DecodeUnary("PlanAppend", &EdubaService::PlanAppend);
  DecodeUnary("CommitAppend", &EdubaService::CommitAppend);
  DecodeUnary("AbortAppend", &EdubaService::AbortAppend);
  DecodeUnary("GetModel", &EdubaService::GetModel);
  DecodeUnary("Score", &EdubaService::Score);
  DecodeUnary("ListWorkers", &EdubaService::ListWorkers);
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Eduba.Generate"),
      DecodingServerStreaming<v1::GenerateRequest, v1::GenerateResponse>(
          [this](auto* context, auto* request, auto* out) { return GenerateInto(context, request, out); }));
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Eduba.Embed"),
      DecodingServerStreaming<v1::EmbedRequest, v1::EmbedResponse>(
          [this](auto* context, auto* request, auto* out) { return EmbedInto(context, request, out); }));
}

template <typename Request, typename Response>
void EdubaService::DecodeUnary(const std::string& method,
                               grpc::Status (EdubaService::*call)(grpc::ServerContext*, const Request*,
                                                                  Response*)) {
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Eduba." + method),
      DecodingUnary<Request, Response>([this, call](auto* context, auto* request, auto* response) {
        return (this->*call)(context, request, response);
      }));
}

grpc::Status EdubaService::CreateSession(grpc::ServerContext* context,
                                         const v1::CreateSessionRequest* request, v1::Session* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.CreateSession(id, *request, absl::ToUnixMillis(absl::Now()), now);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::GetSession(grpc::ServerContext* context, const v1::GetSessionRequest* request,
                                      v1::Session* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t) {
    state.GetSession(id, *request);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                                        v1::ListSessionsResponse* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t) {
    state.ListSessions(id, *request);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::DeleteSession(grpc::ServerContext* context,
                                         const v1::DeleteSessionRequest* request,
                                         v1::DeleteSessionResponse*) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.DeleteSession(id, *request, now);
  };
  Done done;
  return ToGrpc(Ask(runtime_, context, event, &done));
}

grpc::Status EdubaService::PlanAppend(grpc::ServerContext* context, const v1::PlanAppendRequest* request,
                                      v1::AppendPlan* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.PlanAppend(id, *request, now);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::CommitAppend(grpc::ServerContext* context, const v1::CommitAppendRequest* request,
                                        v1::AppendReceipt* response) {
  return ToGrpc(Commit(runtime_, context, request->append_id(), response));
}

grpc::Status EdubaService::AbortAppend(grpc::ServerContext*, const v1::AbortAppendRequest* request,
                                       v1::AbortAppendResponse*) {
  return ToGrpc(Abort(runtime_, request->append_id()));
}

grpc::Status EdubaService::AppendEncoded(grpc::ServerContext* context,
                                         grpc::ServerReader<grpc::ByteBuffer>* reader,
                                         v1::AppendReceipt* response) {
  grpc::ByteBuffer bytes;
  v1::AppendRequest request;
  if (reader->Read(&bytes)) {
    const absl::Status decoded = Decode(&bytes, &request);
    if (!decoded.ok()) return ToGrpc(decoded);
  }
  if (!request.has_plan()) {
    return ToGrpc(absl::InvalidArgumentError("the first message of Append must be `plan`"));
  }
  v1::AppendPlan plan;
  grpc::Status planned = PlanAppend(context, &request.plan(), &plan);
  if (!planned.ok()) return planned;
  // From here on the append is ours to end.
  v1::GetSessionRequest get;
  get.set_name(request.plan().session());
  v1::Session session;
  absl::Status status = FromGrpc(GetSession(context, &get, &session));
  if (status.ok()) {
    ThinUpload upload(*context, session.spec(), plan);
    while (status.ok() && reader->Read(&bytes)) {
      status = Decode(&bytes, &request);
      if (!status.ok()) break;
      status = request.has_piece()
                   ? upload.Send(request.piece())
                   : absl::InvalidArgumentError("every message of Append after the first must be `piece`");
    }
    if (status.ok()) status = upload.Finish();
  }
  if (status.ok()) status = Commit(runtime_, context, plan.append_id(), response);
  if (!status.ok()) (void)Abort(runtime_, plan.append_id());
  return ToGrpc(status);
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* EdubaService::Attend(
    grpc::CallbackServerContext*) {
  return new AttendStream(runtime_);
}

grpc::Status EdubaService::GetModel(grpc::ServerContext* context, const v1::GetModelRequest*,
                                    v1::Model* response) {
  const auto event = [](ClusterState& state, RequestId id, int64_t) { state.GetModel(id); };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::AppendTokensEncoded(grpc::ServerContext* context,
                                               grpc::ServerReader<grpc::ByteBuffer>* reader,
                                               v1::AppendTokensReceipt* response) {
  grpc::ByteBuffer bytes;
  v1::AppendTokensRequest request;
  std::string session;
  std::optional<int64_t> at;
  bool first = true;
  while (reader->Read(&bytes)) {
    const absl::Status decoded = Decode(&bytes, &request);
    if (!decoded.ok()) return ToGrpc(decoded);
    if (first) session = request.session();
    if (first && request.has_at()) at = request.at();
    if (!first && (!request.session().empty() || request.has_at())) {
      return ToGrpc(absl::InvalidArgumentError("only the first message of AppendTokens has session and at"));
    }
    if (request.ids().size() % sizeof(int32_t) != 0) {
      return ToGrpc(absl::InvalidArgumentError(
          absl::StrCat("ids have ", request.ids().size(), " bytes, wanted a multiple of 4 (int32)")));
    }
    std::vector<int32_t> ids(request.ids().size() / sizeof(int32_t));
    if (!ids.empty()) std::memcpy(ids.data(), request.ids().data(), request.ids().size());
    const auto event = [&](ClusterState& state, RequestId id, int64_t now) {
      state.AppendTokens(id, session, at, ids, now);
    };
    v1::AppendTokensReceipt receipt;
    if (const absl::Status status = Ask(runtime_, context, event, &receipt); !status.ok()) {
      return ToGrpc(status);
    }
    if (first) response->set_at(receipt.at());
    response->set_count(response->count() + receipt.count());
    response->set_length(receipt.length());
    response->set_already_stored(response->already_stored() + receipt.already_stored());
    // What another call may have appended meanwhile is not what this one goes on from.
    at = receipt.at() + receipt.count();
    first = false;
  }
  if (first) return ToGrpc(absl::InvalidArgumentError("AppendTokens has no message"));
  return grpc::Status::OK;
}

grpc::Status EdubaService::GenerateInto(grpc::ServerContext* context, const v1::GenerateRequest* request,
                                        Writer<v1::GenerateResponse>* writer) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.Generate(id, *request, now);
  };
  const absl::StatusOr<Answer> answer = AnswerQueue::Run(
      runtime_, event, [context] { return context->IsCancelled(); },
      [writer](AnswerQueue::Piece&& piece) {
        v1::GenerateResponse response;
        *response.mutable_tokens() = std::get<v1::GenerateResponse::Tokens>(std::move(piece));
        return writer->Write(response);
      });
  if (!answer.ok()) return ToGrpc(answer.status());
  v1::GenerateResponse last;
  *last.mutable_summary() = std::get<v1::GenerateSummary>(*answer);
  writer->Write(last);
  return grpc::Status::OK;
}

grpc::Status EdubaService::Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                                 v1::ScoreResponse* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.Score(id, *request, now);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::EmbedInto(grpc::ServerContext* context, const v1::EmbedRequest* request,
                                     Writer<v1::EmbedResponse>* writer) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.Embed(id, *request, now);
  };
  return ToGrpc(
      AnswerQueue::Run(
          runtime_, event, [context] { return context->IsCancelled(); },
          [writer](AnswerQueue::Piece&& piece) { return writer->Write(std::get<v1::EmbedResponse>(piece)); })
          .status());
}

grpc::Status EdubaService::ForkSession(grpc::ServerContext* context, const v1::ForkSessionRequest* request,
                                       v1::Session* response) {
  const auto event = [request](ClusterState& state, RequestId id, int64_t now) {
    state.ForkSession(id, *request, absl::ToUnixMillis(absl::Now()), now);
  };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::Status EdubaService::ListWorkers(grpc::ServerContext* context, const v1::ListWorkersRequest*,
                                       v1::ListWorkersResponse* response) {
  const auto event = [](ClusterState& state, RequestId id, int64_t) { state.ListWorkers(id); };
  return ToGrpc(Ask(runtime_, context, event, response));
}

grpc::ServerBidiReactor<v1::WorkerMessage, v1::GroupMessage>* GroupService::Join(
    grpc::CallbackServerContext* context) {
  return new JoinStream(runtime_, context);
}

grpc::Status GroupService::RendezvousSet(grpc::ServerContext*, const v1::RendezvousSetRequest* request,
                                         v1::RendezvousSetResponse*) {
  return ToGrpc(
      runtime_->board().Set(request->epoch(), request->attempt(), request->key(), request->value()));
}

grpc::Status GroupService::RendezvousGet(grpc::ServerContext* context,
                                         const v1::RendezvousGetRequest* request,
                                         v1::RendezvousGetResponse* response) {
  absl::StatusOr<std::string> value = runtime_->board().Get(
      request->epoch(), request->attempt(), request->key(), [context] { return context->IsCancelled(); });
  if (!value.ok()) return ToGrpc(value.status());
  response->set_value(*std::move(value));
  return grpc::Status::OK;
}

}  // namespace eduba
