#ifndef EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_
#define EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_

#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/mutex.h"
#include "collective/rendezvous.h"

namespace eduba {

// A rendezvous store for ranks that are threads of one process, as in tests and benchmarks. One object serves
// one attempt to form a group.
class MapRendezvous final : public Rendezvous {
 public:
  absl::Status Set(const std::string& key, const std::string& value, absl::Time /*deadline*/) override {
    MutexLock lock(mutex_);
    values_[key] = value;
    changed_.NotifyAll();
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) override {
    MutexLock lock(mutex_);
    while (true) {
      if (const auto found = values_.find(key); found != values_.end()) return found->second;
      if (absl::Now() >= deadline) {
        return absl::DeadlineExceededError(absl::StrCat("nobody has set \"", key, "\""));
      }
      changed_.WaitUntil(mutex_, absl::ToChronoTime(deadline));
    }
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::map<std::string, std::string> values_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_MAP_RENDEZVOUS_H_
