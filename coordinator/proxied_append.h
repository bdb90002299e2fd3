#ifndef EDUBA_COORDINATOR_PROXIED_APPEND_H_
#define EDUBA_COORDINATOR_PROXIED_APPEND_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "coordinator/proxied_upload.h"
#include "coordinator/runtime.h"
#include "eduba/v1/eduba.pb.h"
#include "grpcpp/alarm.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// One Append call: a whole append on behalf of a client that cannot reach the workers. It plans, forwards the
// client's pieces (ProxiedUpload), and commits; when anything fails, it ends the upload, aborts the append,
// and only then says so to the client, which may begin again at once. The next piece is read when the last
// one has gone to the workers. Holds no thread while it waits.
//
// It owns itself until the call has ended, and longer if a callback of the upload is still running.
class ProxiedAppend final : public grpc::ServerReadReactor<grpc::ByteBuffer>,
                            public Caller,
                            public std::enable_shared_from_this<ProxiedAppend> {
 public:
  // `context` and `response` are the call's, as gRPC gave them to the handler.
  static ProxiedAppend* Start(Runtime* runtime, grpc::CallbackServerContext* context,
                              grpc::ByteBuffer* response);

  void OnReply(absl::StatusOr<Answer> answer) override;

  void OnReadDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // What the call waits for. kAbort may follow any of those before it.
  enum class Phase { kFirstMessage, kPlan, kPieces, kCommit, kAbort, kEnded };

  ProxiedAppend(Runtime* runtime, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : runtime_(runtime), context_(context), response_(response) {}

  // The steps of the append. None is called with mutex_ held.
  absl::Status Plan(bool read);
  absl::Status Forward();
  void Uploaded(const absl::Status& status);
  void Commit();
  // The first failure ends the append; later ones change nothing.
  void Fail(const absl::Status& status);
  void Unwind(RequestId request);
  void Abort();

  // Begins a request. It is cancelled again if the call has failed meanwhile.
  void Ask(Phase phase, const Runtime::Event& event);
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Runtime* const runtime_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;
  grpc::ByteBuffer bytes_;               // the message that is being read; of the reading reaction
  grpc::Alarm later_;                    // takes a step to one of gRPC's threads, out of the runtime's mutex
  std::shared_ptr<ProxiedAppend> self_;  // until OnDone

  // Never held while the runtime or the upload is called: the runtime calls OnReply with its own mutex held.
  Mutex mutex_;
  Phase phase_ ABSL_GUARDED_BY(mutex_) = Phase::kFirstMessage;
  RequestId request_ ABSL_GUARDED_BY(mutex_) = 0;  // the plan's, then the commit's
  bool asking_ ABSL_GUARDED_BY(mutex_) = false;    // request_ is about to be known
  bool aborting_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::string session_ ABSL_GUARDED_BY(mutex_);
  std::optional<v1::AppendPlan> plan_ ABSL_GUARDED_BY(mutex_);     // from here on the append is ours to end
  std::unique_ptr<ProxiedUpload> upload_ ABSL_GUARDED_BY(mutex_);  // from the first piece on; then it stays
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_PROXIED_APPEND_H_
