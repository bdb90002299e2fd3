#include "coordinator/answer_stream.h"

#include <utility>
#include <variant>

#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {

AnswerStream::AnswerStream(Runtime* runtime, const Runtime::Event& event) : runtime_(runtime) {
  const RequestId id = runtime_->Start(this, event);
  const MutexLock lock(mutex_);
  id_ = id;
}

AnswerStream::AnswerStream(const absl::Status& status) : runtime_(nullptr) {
  const MutexLock lock(mutex_);
  EndWith(status);
}

void AnswerStream::OnGenerated(v1::GenerateResponse::Tokens&& tokens) {
  v1::GenerateResponse response;
  *response.mutable_tokens() = std::move(tokens);
  const MutexLock lock(mutex_);
  Enqueue(response);
}

void AnswerStream::OnEmbedded(v1::EmbedResponse&& rows) {
  const MutexLock lock(mutex_);
  Enqueue(rows);
}

void AnswerStream::OnReply(absl::StatusOr<Answer> answer) {
  const MutexLock lock(mutex_);
  if (answer.ok() && std::holds_alternative<v1::GenerateSummary>(*answer)) {
    v1::GenerateResponse last;
    *last.mutable_summary() = std::get<v1::GenerateSummary>(*std::move(answer));
    Enqueue(last);
    return EndWith(absl::OkStatus());
  }
  EndWith(answer.status());
}

void AnswerStream::OnCancel() {
  RequestId id = 0;
  {
    const MutexLock lock(mutex_);
    id = id_;
  }
  if (id != 0) runtime_->Cancel(id);
  const MutexLock lock(mutex_);
  if (queue_.size() > 1) queue_.erase(queue_.begin() + 1, queue_.end());
  EndWith(CallerGone());
}

void AnswerStream::Enqueue(const google::protobuf::MessageLite& message) {
  if (ending_) return;
  queue_.push_back(Encode(message));
  if (queue_.size() == 1) StartWrite(&queue_.front());
}

void AnswerStream::EndWith(const absl::Status& status) {
  if (finished_) return;
  if (!ending_) end_ = status;
  ending_ = true;
  if (!queue_.empty()) return;
  finished_ = true;
  Finish(ToGrpc(end_));
}

void AnswerStream::OnWriteDone(bool ok) {
  const MutexLock lock(mutex_);
  queue_.pop_front();
  if (!ok) queue_.clear();  // The call is cancelled; OnCancel ends it.
  if (!queue_.empty()) return StartWrite(&queue_.front());
  if (ending_) EndWith(end_);
}

void AnswerStream::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  delete this;
}

}  // namespace eduba
