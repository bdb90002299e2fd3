#ifndef EDUBA_COORDINATOR_UNARY_CALL_H_
#define EDUBA_COORDINATOR_UNARY_CALL_H_

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// The message that an answer is to a client; an empty one for Done. REQUIRES: not AttendTotals.
grpc::ByteBuffer EncodeAnswer(const Answer& answer);

// A call of one question and one answer, which the runtime gives. Holds no thread while it waits. Deletes
// itself when the call has ended.
class UnaryCall final : public grpc::ServerUnaryReactor, public Caller {
 public:
  // Begins the request with `event`. `response` is the call's, as gRPC gave it to the handler.
  UnaryCall(Runtime* runtime, const Runtime::Event& event, grpc::ByteBuffer* response);

  void OnReply(absl::StatusOr<Answer> answer) override;

  void OnCancel() override;
  void OnDone() override;

 private:
  ~UnaryCall() override = default;
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Runtime* const runtime_;
  grpc::ByteBuffer* const response_;

  // Never held while the runtime is called: the runtime calls OnReply with its own mutex held.
  Mutex mutex_;
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_UNARY_CALL_H_
