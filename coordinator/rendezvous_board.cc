#include "coordinator/rendezvous_board.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr size_t kKeysMax = 65536;  // 64 ranks and their pairs, many times over
constexpr size_t kValueBytesMax = 65536;
constexpr size_t kKeyBytesMax = 256;
constexpr std::chrono::milliseconds kCancelPoll{20};

}  // namespace

void RendezvousBoard::Reset(uint64_t epoch, uint32_t attempt) {
  const std::lock_guard lock(mutex_);
  attempt_ = {epoch, attempt};
  values_.clear();
  changed_.notify_all();
}

absl::Status RendezvousBoard::CheckAttempt(uint64_t epoch, uint32_t attempt) const {
  if (epoch != 0 && attempt_ == std::make_pair(epoch, attempt)) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("attempt ", attempt, " to form epoch ", epoch, " is over"));
}

absl::Status RendezvousBoard::Set(uint64_t epoch, uint32_t attempt, const std::string& key,
                                  const std::string& value) {
  if (key.size() > kKeyBytesMax || value.size() > kValueBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("rendezvous key of ", key.size(), " and value of ",
                                                   value.size(), " bytes, at most ", kKeyBytesMax, " and ",
                                                   kValueBytesMax));
  }
  const std::lock_guard lock(mutex_);
  EDUBA_RETURN_IF_ERROR(CheckAttempt(epoch, attempt));
  if (values_.size() >= kKeysMax) return absl::ResourceExhaustedError("the rendezvous board is full");
  values_[key] = value;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::StatusOr<std::string> RendezvousBoard::Get(uint64_t epoch, uint32_t attempt, const std::string& key,
                                                 const std::function<bool()>& cancelled) {
  std::unique_lock lock(mutex_);
  for (;;) {
    EDUBA_RETURN_IF_ERROR(CheckAttempt(epoch, attempt));
    const auto it = values_.find(key);
    if (it != values_.end()) return it->second;
    if (cancelled()) return absl::CancelledError(absl::StrCat("nobody has set '", key, "'"));
    changed_.wait_for(lock, kCancelPoll);
  }
}

}  // namespace eduba
