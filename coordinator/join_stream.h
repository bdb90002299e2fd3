#ifndef EDUBA_COORDINATOR_JOIN_STREAM_H_
#define EDUBA_COORDINATOR_JOIN_STREAM_H_

#include <deque>
#include <memory>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "eduba/v1/group.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// One worker's Join stream. Messages wait in a queue of their own, so a slow worker delays nobody else.
// Deletes itself when the stream has ended.
class JoinStream final : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::GroupMessage>,
                         public WorkerLink {
 public:
  JoinStream(Runtime* runtime, grpc::CallbackServerContext* context);

  void Send(std::shared_ptr<const v1::GroupMessage> message) override;
  void Close(const absl::Status& status) override;

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  ~JoinStream() override = default;
  WorkerId id();

  Runtime* const runtime_;
  grpc::CallbackServerContext* const context_;
  v1::WorkerMessage incoming_;

  // Never held while the runtime is called: the runtime calls Send and Close with its own mutex held.
  Mutex mutex_;
  WorkerId id_ ABSL_GUARDED_BY(mutex_) = 0;
  // The front is being written.
  std::deque<std::shared_ptr<const v1::GroupMessage>> queue_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> closing_ ABSL_GUARDED_BY(mutex_);
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_JOIN_STREAM_H_
