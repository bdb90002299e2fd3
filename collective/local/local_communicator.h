#ifndef EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collective/communicator.h"

namespace eduba {

class LocalGroup;

// Where the workers of one process meet: each calls Join from its own thread and gets its rank's
// Communicator. No bytes are copied between ranks: the result is written straight into every rank's `data`,
// by whichever ranks are awake.
//
// A group is known by (epoch, attempt) and forgotten once every Communicator of it is destroyed. A
// Communicator may outlive the hub. Destroying one ends the group for the others: a call under way there
// returns UNAVAILABLE.
class LocalHub {
 public:
  // Returns once all `size` ranks have joined. Thread-safe.
  //   INVALID_ARGUMENT     rank is not in [0, size)
  //   FAILED_PRECONDITION  the group that is forming has another size
  //   ALREADY_EXISTS       the rank has joined this group before
  //   DEADLINE_EXCEEDED    a rank did not come by `deadline`
  //   UNAVAILABLE          a rank gave up or left while the group was forming; make a new attempt
  absl::StatusOr<std::unique_ptr<Communicator>> Join(uint64_t epoch, uint32_t attempt, int rank, int size,
                                                     absl::Time deadline);

 private:
  std::mutex mutex_;
  std::map<std::pair<uint64_t, uint32_t>, std::weak_ptr<LocalGroup>> groups_;  // Guarded by mutex_.
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_
