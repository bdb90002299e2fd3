#ifndef EDUBA_COORDINATOR_RENDEZVOUS_STORE_H_
#define EDUBA_COORDINATOR_RENDEZVOUS_STORE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"

namespace eduba {

// Where the ranks of one attempt to form a group leave their addresses for each other. Thread-safe. Whoever
// waits for a key holds no thread.
class RendezvousStore {
 public:
  // Called once, with the store's mutex held: must neither block nor call the store.
  using Waiter = std::function<void(absl::StatusOr<std::string> value)>;

  // Forgets all keys; whoever waits gets ABORTED. Epoch 0: nobody's.
  void Reset(uint64_t epoch, uint32_t attempt);

  // ABORTED when the attempt is not the present one; RESOURCE_EXHAUSTED when the store is full.
  absl::Status Set(uint64_t epoch, uint32_t attempt, const std::string& key, const std::string& value);

  // Calls `waiter` with the key's value as soon as it is set, which may be before Get returns. ABORTED when
  // the attempt is not the present one, or ends first. The number that comes back is for Cancel.
  uint64_t Get(uint64_t epoch, uint32_t attempt, const std::string& key, Waiter waiter);
  // The waiter is not called any more. False when it has been called already.
  bool Cancel(uint64_t waiter);

  // How many wait.
  size_t waiting() const;

 private:
  struct Waiting {
    std::string key;
    Waiter waiter;
  };

  absl::Status CheckAttempt(uint64_t epoch, uint32_t attempt) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::pair<uint64_t, uint32_t> attempt_ ABSL_GUARDED_BY(mutex_) = {0, 0};
  std::map<std::string, std::string> values_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, Waiting> waiting_ ABSL_GUARDED_BY(mutex_);  // at most one for each RendezvousGet call
  uint64_t next_waiter_ ABSL_GUARDED_BY(mutex_) = 1;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RENDEZVOUS_STORE_H_
