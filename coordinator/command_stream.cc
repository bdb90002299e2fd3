#include "coordinator/command_stream.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace eduba {
namespace {

// Workers answer within the timeout that they were given; this much later they are not going to.
constexpr int64_t kAnswerGraceMs = 2000;

}  // namespace

void CommandStream::Begin(uint64_t epoch, std::vector<WorkerId> workers, int64_t now_ms) {
  epoch_ = epoch;
  workers_ = std::move(workers);
  next_ordinal_ = 1;
  answered_ms_ = now_ms;
}

void CommandStream::End() {
  pending_.clear();
  workers_.clear();
}

std::shared_ptr<const v1::GroupMessage> CommandStream::Send(v1::Command command, int64_t now_ms, Done done,
                                                            const Share& share, int64_t extra_ms) {
  EDUBA_CHECK(!workers_.empty());
  Pending pending;
  pending.results.resize(workers_.size());
  pending.missing = static_cast<int>(workers_.size());
  pending.sent_ms = now_ms;
  pending.timeout_ms = timeout_ms_ + extra_ms;
  pending.done = std::move(done);
  const uint64_t ordinal = next_ordinal_++;
  command.set_epoch(epoch_);
  command.set_ordinal(ordinal);
  command.set_timeout_ms(pending.timeout_ms);
  pending_.emplace(ordinal, std::move(pending));
  auto message = std::make_shared<v1::GroupMessage>();
  *message->mutable_command() = std::move(command);
  for (size_t rank = 0; rank < workers_.size(); ++rank) {
    if (share == nullptr) {
      outbox_->Emit(SendToWorker{workers_[rank], message});
      continue;
    }
    auto own = std::make_shared<v1::GroupMessage>(*message);
    share(static_cast<int>(rank), own->mutable_command());
    outbox_->Emit(SendToWorker{workers_[rank], std::move(own)});
  }
  return message;
}

bool CommandStream::Take(int rank, v1::CommandResult result, int64_t now_ms) {
  const auto it = pending_.find(result.ordinal());
  if (it == pending_.end() || it->second.results[rank].has_value()) return false;
  it->second.results[rank] = std::move(result);
  if (--it->second.missing > 0) return true;
  answered_ms_ = now_ms;
  Pending complete = std::move(it->second);
  Answered answered{it->first, {}};
  pending_.erase(it);
  for (auto& own : complete.results) answered.results.push_back(*std::move(own));
  if (complete.done != nullptr) complete.done(std::move(answered), now_ms);
  return true;
}

std::optional<CommandStream::Late> CommandStream::FindLate(int64_t now_ms) const {
  if (pending_.empty()) return std::nullopt;
  const auto& [ordinal, first] = *pending_.begin();
  if (now_ms <= std::max(first.sent_ms, answered_ms_) + first.timeout_ms + kAnswerGraceMs)
    return std::nullopt;
  const auto silent = std::find_if(first.results.begin(), first.results.end(),
                                   [](const auto& result) { return !result.has_value(); });
  return Late{static_cast<int>(silent - first.results.begin()), ordinal};
}

}  // namespace eduba
