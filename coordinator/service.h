#ifndef EDUBA_COORDINATOR_SERVICE_H_
#define EDUBA_COORDINATOR_SERVICE_H_

#include <string>

#include "coordinator/runtime.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/group.grpc.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"

namespace eduba {

// The doors of the coordinator: convert, hand to the runtime, wait, convert back. Streams that go both ways
// are callbacks (AttendStream, JoinStream), because only those can end a stream whose other side is silent.
// What clients send arrives encoded (rpc/raw.h).

class EdubaService final : public v1::Eduba::WithRawCallbackMethod_Attend<v1::Eduba::Service> {
 public:
  explicit EdubaService(Runtime* runtime);

  grpc::Status CreateSession(grpc::ServerContext* context, const v1::CreateSessionRequest* request,
                             v1::Session* response) override;
  grpc::Status GetSession(grpc::ServerContext* context, const v1::GetSessionRequest* request,
                          v1::Session* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;
  grpc::Status DeleteSession(grpc::ServerContext* context, const v1::DeleteSessionRequest* request,
                             v1::DeleteSessionResponse* response) override;
  grpc::Status PlanAppend(grpc::ServerContext* context, const v1::PlanAppendRequest* request,
                          v1::AppendPlan* response) override;
  grpc::Status CommitAppend(grpc::ServerContext* context, const v1::CommitAppendRequest* request,
                            v1::AppendReceipt* response) override;
  grpc::Status AbortAppend(grpc::ServerContext* context, const v1::AbortAppendRequest* request,
                           v1::AbortAppendResponse* response) override;
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attend(
      grpc::CallbackServerContext* context) override;
  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest* request,
                        v1::Model* response) override;
  grpc::Status Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                     v1::ScoreResponse* response) override;
  grpc::Status ForkSession(grpc::ServerContext* context, const v1::ForkSessionRequest* request,
                           v1::Session* response) override;
  grpc::Status ListWorkers(grpc::ServerContext* context, const v1::ListWorkersRequest* request,
                           v1::ListWorkersResponse* response) override;

 private:
  template <typename T>
  using Writer = grpc::internal::WriterInterface<T>;

  // Lets `method` of one message come here decoded.
  template <typename Request, typename Response>
  void DecodeUnary(const std::string& method,
                   grpc::Status (EdubaService::*call)(grpc::ServerContext*, const Request*, Response*));
  grpc::Status AppendEncoded(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
                             v1::AppendReceipt* response);
  grpc::Status AppendTokensEncoded(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
                                   v1::AppendTokensReceipt* response);
  grpc::Status GenerateInto(grpc::ServerContext* context, const v1::GenerateRequest* request,
                            Writer<v1::GenerateResponse>* writer);
  grpc::Status EmbedInto(grpc::ServerContext* context, const v1::EmbedRequest* request,
                         Writer<v1::EmbedResponse>* writer);

  Runtime* const runtime_;
};

class GroupService final : public v1::Group::WithCallbackMethod_Join<v1::Group::Service> {
 public:
  explicit GroupService(Runtime* runtime) : runtime_(runtime) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::GroupMessage>* Join(
      grpc::CallbackServerContext* context) override;
  grpc::Status RendezvousSet(grpc::ServerContext* context, const v1::RendezvousSetRequest* request,
                             v1::RendezvousSetResponse* response) override;
  grpc::Status RendezvousGet(grpc::ServerContext* context, const v1::RendezvousGetRequest* request,
                             v1::RendezvousGetResponse* response) override;

 private:
  Runtime* const runtime_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_SERVICE_H_
