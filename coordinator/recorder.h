#ifndef EDUBA_COORDINATOR_RECORDER_H_
#define EDUBA_COORDINATOR_RECORDER_H_

#include <vector>

#include "absl/status/status.h"
#include "coordinator/records.h"

namespace eduba {

// Where changes are written down for good. Used by one thread at a time.
class Recorder {
 public:
  virtual ~Recorder() = default;
  // Returns one status for each change, in order. A change is on the disk when its status is OK, and wholly
  // absent otherwise. May wait for the disk.
  virtual std::vector<absl::Status> ApplyAll(const std::vector<Change>& changes) = 0;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RECORDER_H_
