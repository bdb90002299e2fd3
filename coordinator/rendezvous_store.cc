#include "coordinator/rendezvous_store.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr size_t kKeysMax = 65536;  // 64 ranks and their pairs, many times over
constexpr size_t kValueBytesMax = 65536;
constexpr size_t kKeyBytesMax = 256;

}  // namespace

void RendezvousStore::Reset(uint64_t epoch, uint32_t attempt) {
  const MutexLock lock(mutex_);
  const auto [old_epoch, old_attempt] = std::exchange(attempt_, {epoch, attempt});
  values_.clear();
  for (const auto& [id, waiting] : std::exchange(waiting_, {})) {
    waiting.waiter(CheckAttempt(old_epoch, old_attempt));
  }
}

absl::Status RendezvousStore::CheckAttempt(uint64_t epoch, uint32_t attempt) const {
  if (epoch != 0 && attempt_ == std::make_pair(epoch, attempt)) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("attempt ", attempt, " to form epoch ", epoch, " is over"));
}

absl::Status RendezvousStore::Set(uint64_t epoch, uint32_t attempt, const std::string& key,
                                  const std::string& value) {
  if (key.size() > kKeyBytesMax || value.size() > kValueBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("rendezvous key of ", key.size(), " and value of ",
                                                   value.size(), " bytes, at most ", kKeyBytesMax, " and ",
                                                   kValueBytesMax));
  }
  const MutexLock lock(mutex_);
  EDUBA_RETURN_IF_ERROR(CheckAttempt(epoch, attempt));
  if (values_.size() >= kKeysMax) return absl::ResourceExhaustedError("the rendezvous store is full");
  values_[key] = value;
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (it->second.key != key) {
      ++it;
      continue;
    }
    it->second.waiter(value);
    it = waiting_.erase(it);
  }
  return absl::OkStatus();
}

uint64_t RendezvousStore::Get(uint64_t epoch, uint32_t attempt, const std::string& key, Waiter waiter) {
  const MutexLock lock(mutex_);
  const uint64_t id = next_waiter_++;
  const absl::Status current = CheckAttempt(epoch, attempt);
  if (!current.ok()) {
    waiter(current);
  } else if (key.size() > kKeyBytesMax) {
    waiter(absl::InvalidArgumentError(
        absl::StrCat("rendezvous key of ", key.size(), " bytes, at most ", kKeyBytesMax)));
  } else if (const auto it = values_.find(key); it != values_.end()) {
    waiter(it->second);
  } else {
    waiting_[id] = {key, std::move(waiter)};
  }
  return id;
}

bool RendezvousStore::Cancel(uint64_t waiter) {
  const MutexLock lock(mutex_);
  return waiting_.erase(waiter) > 0;
}

size_t RendezvousStore::waiting() const {
  const MutexLock lock(mutex_);
  return waiting_.size();
}

}  // namespace eduba
