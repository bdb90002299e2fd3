#include "coordinator/unary_call.h"

#include <type_traits>
#include <utility>
#include <variant>

#include "base/check.h"
#include "google/protobuf/message_lite.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {

grpc::ByteBuffer EncodeAnswer(const Answer& answer) {
  return std::visit(
      [](const auto& message) {
        using T = std::decay_t<decltype(message)>;
        if constexpr (std::is_base_of_v<google::protobuf::MessageLite, T>) {
          return Encode(message);
        } else {
          EDUBA_CHECK((std::is_same_v<T, Done>));
          return Encode(v1::DeleteSessionResponse());  // Empty, as every answer that only says "done".
        }
      },
      answer);
}

UnaryCall::UnaryCall(Runtime* runtime, const Runtime::Event& event, grpc::ByteBuffer* response)
    : runtime_(runtime), response_(response) {
  const RequestId id = runtime_->Start(this, event);
  const MutexLock lock(mutex_);
  id_ = id;
}

void UnaryCall::OnReply(absl::StatusOr<Answer> answer) {
  const MutexLock lock(mutex_);
  if (finished_) return;
  if (answer.ok()) *response_ = EncodeAnswer(*answer);
  End(answer.status());
}

void UnaryCall::OnCancel() {
  RequestId id = 0;
  {
    const MutexLock lock(mutex_);
    id = id_;
  }
  runtime_->Cancel(id);
  const MutexLock lock(mutex_);
  if (!finished_) End(CallerGone());
}

void UnaryCall::End(const absl::Status& status) {
  finished_ = true;
  Finish(ToGrpc(status));
}

void UnaryCall::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  delete this;
}

}  // namespace eduba
