#ifndef EDUBA_COORDINATOR_ANSWER_STREAM_H_
#define EDUBA_COORDINATOR_ANSWER_STREAM_H_

#include <deque>
#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "eduba/v1/eduba.pb.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// One Generate or Embed call: passes on what the workers bring, piece by piece, as fast as the client takes
// it. What a slow client has not taken waits here, encoded: at most all tokens of one generation, or all
// vectors of one embedding; it goes when the call ends, however it does. Holds no thread while it waits.
// Deletes itself when the call has ended.
class AnswerStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public Caller {
 public:
  // Begins the request with `event`.
  AnswerStream(Runtime* runtime, const Runtime::Event& event);
  // A call that has failed before it began.
  explicit AnswerStream(const absl::Status& status);

  void OnGenerated(v1::GenerateResponse::Tokens&& tokens) override;
  void OnEmbedded(v1::EmbedResponse&& rows) override;
  void OnReply(absl::StatusOr<Answer> answer) override;

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  ~AnswerStream() override = default;

  void Enqueue(const google::protobuf::MessageLite& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Runtime* const runtime_;

  // Never held while the runtime is called: the runtime calls On... with its own mutex held.
  Mutex mutex_;
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<grpc::ByteBuffer> queue_ ABSL_GUARDED_BY(mutex_);  // the front is being written
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;                 // the call ends once the queue is empty
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_ANSWER_STREAM_H_
