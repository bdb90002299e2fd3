#ifndef EDUBA_COORDINATOR_JOURNAL_H_
#define EDUBA_COORDINATOR_JOURNAL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "base/check.h"
#include "coordinator/outbox.h"
#include "coordinator/records.h"

namespace eduba {

// The changes that are on their way to the disk, and what is to happen after each. All state machines write
// through one journal, and changes are written in the order in which they were asked for. From this follows:
// once an epoch's beginning is written down, so is everything that was asked for in earlier epochs.
//
// Anything may happen between Write and the call of `done`: the epoch may end, the session may be deleted.
// Whoever writes looks again at what is there.
class Journal {
 public:
  using Done = std::function<void(const absl::Status& status, int64_t now_ms)>;

  explicit Journal(Outbox* outbox) : outbox_(outbox) {}

  // Asks for the change to be written down. `done` hears once whether it is on the disk.
  void Write(Change change, Done done) {
    const uint64_t id = next_++;
    pending_.emplace(id, std::move(done));
    outbox_->Emit(Persist{id, std::move(change)});
  }

  // The answer to the oldest Persist that has none yet.
  void Persisted(uint64_t id, const absl::Status& status, int64_t now_ms) {
    EDUBA_CHECK(!pending_.empty() && pending_.begin()->first == id);
    const Done done = std::move(pending_.begin()->second);
    pending_.erase(pending_.begin());
    done(status, now_ms);
  }

 private:
  Outbox* const outbox_;
  std::map<uint64_t, Done> pending_;
  uint64_t next_ = 1;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_JOURNAL_H_
