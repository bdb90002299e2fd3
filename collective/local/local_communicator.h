#ifndef EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "collective/communicator.h"

namespace eduba {

class LocalGroup;

// The place where the workers of one process meet. Each worker calls Join from a thread of its own and gets
// its rank's Communicator. No bytes are copied between ranks: the ranks that are awake write the result
// straight into every rank's `data`.
//
// A group is known by its epoch and attempt. It is forgotten once all its Communicators are destroyed. A
// Communicator may outlive the hub. Destroying a Communicator ends the group for the others: a call that they
// have under way returns UNAVAILABLE.
class LocalHub {
 public:
  // Returns when all `size` ranks have joined. Thread-safe.
  //   INVALID_ARGUMENT     rank is not in [0, size)
  //   FAILED_PRECONDITION  the group that is forming has another size
  //   ALREADY_EXISTS       the rank has joined this group before
  //   DEADLINE_EXCEEDED    a rank did not join by `deadline`
  //   UNAVAILABLE          a rank gave up or left while the group was forming: make a new attempt
  absl::StatusOr<std::unique_ptr<Communicator>> Join(uint64_t epoch, uint32_t attempt, int rank, int size,
                                                     absl::Time deadline);

 private:
  Mutex mutex_;
  // By epoch and attempt. The communicators own the groups.
  std::map<std::pair<uint64_t, uint32_t>, std::weak_ptr<LocalGroup>> groups_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_LOCAL_LOCAL_COMMUNICATOR_H_
