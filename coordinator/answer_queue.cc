#include "coordinator/answer_queue.h"

#include <chrono>

namespace eduba {
namespace {

constexpr std::chrono::milliseconds kCancelPoll{20};

}  // namespace

absl::StatusOr<Answer> AnswerQueue::Run(Runtime* runtime, const Runtime::Event& event,
                                        const std::function<bool()>& cancelled,
                                        const std::function<bool(Piece&& piece)>& take) {
  AnswerQueue queue;
  const RequestId id = runtime->Start(&queue, event);
  bool taken = true;
  while (taken) {
    std::optional<Piece> piece = queue.Next(cancelled);
    if (!piece) break;
    taken = take(*std::move(piece));
  }
  // Without effect where the answer has come; afterwards nobody calls the queue any more.
  runtime->Cancel(id);
  const std::lock_guard lock(queue.mutex_);
  if (!taken || !queue.answer_) return absl::CancelledError("the caller gave up or its deadline passed");
  return *std::move(queue.answer_);
}

void AnswerQueue::OnReply(absl::StatusOr<Answer> answer) {
  const std::lock_guard lock(mutex_);
  answer_ = std::move(answer);
  changed_.notify_one();
}

void AnswerQueue::Push(Piece piece) {
  const std::lock_guard lock(mutex_);
  pieces_.push_back(std::move(piece));
  changed_.notify_one();
}

std::optional<AnswerQueue::Piece> AnswerQueue::Next(const std::function<bool()>& cancelled) {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kCancelPoll, [this] { return !pieces_.empty() || answer_; })) {
    if (cancelled()) return std::nullopt;
  }
  if (pieces_.empty()) return std::nullopt;
  Piece piece = std::move(pieces_.front());
  pieces_.pop_front();
  return piece;
}

}  // namespace eduba
