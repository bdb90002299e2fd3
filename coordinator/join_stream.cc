#include "coordinator/join_stream.h"

#include <utility>

#include "rpc/status.h"

namespace eduba {

JoinStream::JoinStream(Runtime* runtime, grpc::CallbackServerContext* context)
    : runtime_(runtime), context_(context) {
  const absl::StatusOr<WorkerId> id = runtime_->AddWorker(this);
  if (!id.ok()) {
    Close(id.status());
    return;
  }
  // Once a read has been started, reactions come on other threads.
  const MutexLock lock(mutex_);
  id_ = *id;
  if (!finished_) StartRead(&incoming_);
}

void JoinStream::Send(std::shared_ptr<const v1::GroupMessage> message) {
  const MutexLock lock(mutex_);
  if (closing_.has_value() || finished_) return;
  queue_.push_back(std::move(message));
  if (queue_.size() == 1) StartWrite(queue_.front().get());
}

void JoinStream::Close(const absl::Status& status) {
  const MutexLock lock(mutex_);
  if (closing_.has_value() || finished_) return;
  if (queue_.empty()) {
    finished_ = true;
    return Finish(ToGrpc(status));
  }
  closing_ = status;
  // A worker that does not take its messages must not hold up the end of its stream.
  context_->TryCancel();
}

WorkerId JoinStream::id() {
  const MutexLock lock(mutex_);
  return id_;
}

void JoinStream::OnReadDone(bool ok) {
  if (!ok) {
    runtime_->RemoveWorker(id(), "its stream ended");
    return Close(absl::UnavailableError("the stream ended"));
  }
  WorkerId worker = 0;
  v1::WorkerMessage message;
  {
    // The last reaction ran on another thread.
    const MutexLock lock(mutex_);
    worker = id_;
    message.Swap(&incoming_);
  }
  runtime_->WorkerSaid(worker, std::move(message));
  const MutexLock lock(mutex_);
  if (!finished_ && !closing_.has_value()) StartRead(&incoming_);
}

void JoinStream::OnWriteDone(bool ok) {
  const MutexLock lock(mutex_);
  queue_.pop_front();
  if (!ok) queue_.clear();  // The read side ends too, and says so to the runtime.
  if (!queue_.empty()) return StartWrite(queue_.front().get());
  if (!closing_.has_value() || finished_) return;
  finished_ = true;
  Finish(ToGrpc(*closing_));
}

void JoinStream::OnCancel() {
  runtime_->RemoveWorker(id(), "its connection broke");
  Close(absl::CancelledError("the connection broke"));
}

void JoinStream::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  delete this;
}

}  // namespace eduba
