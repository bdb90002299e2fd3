#ifndef EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_
#define EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/rendezvous.h"

namespace eduba {

// A rendezvous for ranks that are threads of one process: tests and `eduba bench merge`. One object is one
// attempt.
class MapRendezvous final : public Rendezvous {
 public:
  absl::Status Set(const std::string& key, const std::string& value, absl::Time /*deadline*/) override {
    std::lock_guard<std::mutex> lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) override {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = [&] { return values_.count(key) > 0; };
    if (!changed_.wait_until(lock, absl::ToChronoTime(deadline), found)) {
      return absl::DeadlineExceededError(absl::StrCat("nobody has set \"", key, "\""));
    }
    return values_[key];
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;  // Guarded by mutex_.
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_
