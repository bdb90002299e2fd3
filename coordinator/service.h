#ifndef EDUBA_COORDINATOR_SERVICE_H_
#define EDUBA_COORDINATOR_SERVICE_H_

#include "coordinator/runtime.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/group.grpc.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// Every method takes its messages encoded (rpc/raw.h says why) and is a reactor: no call holds a thread while
// it waits, so that thousands of calls may wait. A handler decodes, begins a request of the runtime, and
// returns; the reply ends the call.
using RawEdubaService = v1::Eduba::WithRawCallbackMethod_CreateSession<
    v1::Eduba::WithRawCallbackMethod_GetSession<v1::Eduba::WithRawCallbackMethod_ListSessions<
        v1::Eduba::WithRawCallbackMethod_DeleteSession<v1::Eduba::WithRawCallbackMethod_PlanAppend<
            v1::Eduba::WithRawCallbackMethod_CommitAppend<v1::Eduba::WithRawCallbackMethod_AbortAppend<
                v1::Eduba::WithRawCallbackMethod_Append<v1::Eduba::WithRawCallbackMethod_Attend<
                    v1::Eduba::WithRawCallbackMethod_GetModel<v1::Eduba::WithRawCallbackMethod_AppendTokens<
                        v1::Eduba::WithRawCallbackMethod_Generate<
                            v1::Eduba::WithRawCallbackMethod_Score<v1::Eduba::WithRawCallbackMethod_Embed<
                                v1::Eduba::WithRawCallbackMethod_ForkSession<
                                    v1::Eduba::WithRawCallbackMethod_ListWorkers<
                                        v1::Eduba::Service>>>>>>>>>>>>>>>>;

// What clients call.
class EdubaService final : public RawEdubaService {
 public:
  explicit EdubaService(Runtime* runtime) : runtime_(runtime) {}

  grpc::ServerUnaryReactor* CreateSession(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetSession(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* DeleteSession(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* PlanAppend(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* CommitAppend(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* AbortAppend(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Score(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ForkSession(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerReadReactor<grpc::ByteBuffer>* Append(grpc::CallbackServerContext* context,
                                                    grpc::ByteBuffer* response) override;
  grpc::ServerReadReactor<grpc::ByteBuffer>* AppendTokens(grpc::CallbackServerContext* context,
                                                          grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Embed(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer* request) override;
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attend(
      grpc::CallbackServerContext* context) override;

 private:
  Runtime* const runtime_;
};

// What workers call. A Join stream is not raw: what cannot be decoded there ends it, as a broken connection
// does.
class GroupService final
    : public v1::Group::WithCallbackMethod_Join<v1::Group::WithRawCallbackMethod_RendezvousSet<
          v1::Group::WithRawCallbackMethod_RendezvousGet<v1::Group::Service>>> {
 public:
  explicit GroupService(Runtime* runtime) : runtime_(runtime) {}

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::GroupMessage>* Join(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* RendezvousSet(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* RendezvousGet(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;

 private:
  Runtime* const runtime_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_SERVICE_H_
