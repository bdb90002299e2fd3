#ifndef EDUBA_COORDINATOR_APPEND_TOKENS_STREAM_H_
#define EDUBA_COORDINATOR_APPEND_TOKENS_STREAM_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "eduba/v1/eduba.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// One AppendTokens call. Each message is one request to the runtime, and the next message is read after its
// answer, so a fast client waits and nothing is buffered. Holds no thread while it waits. Deletes itself when
// the call has ended.
class AppendTokensStream final : public grpc::ServerReadReactor<grpc::ByteBuffer>, public Caller {
 public:
  // `context` and `response` are the call's, as gRPC gave them to the handler.
  AppendTokensStream(Runtime* runtime, grpc::CallbackServerContext* context, grpc::ByteBuffer* response);

  void OnReply(absl::StatusOr<Answer> answer) override;

  void OnReadDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  ~AppendTokensStream() override = default;

  // One message of the client: begins its request.
  absl::Status Submit(const v1::AppendTokensRequest& request);
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Runtime* const runtime_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;
  grpc::ByteBuffer bytes_;  // the message that is being read; of the reading reaction

  // Never held while the runtime is called: the runtime calls OnReply with its own mutex held.
  Mutex mutex_;
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;  // of the latest message; ids only grow
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool first_ ABSL_GUARDED_BY(mutex_) = true;  // no message has been answered yet
  std::string session_ ABSL_GUARDED_BY(mutex_);
  // Where the next message's tokens go. What another call may append meanwhile is not what this one goes on
  // from.
  std::optional<int64_t> at_ ABSL_GUARDED_BY(mutex_);
  v1::AppendTokensReceipt total_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_APPEND_TOKENS_STREAM_H_
