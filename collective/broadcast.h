#ifndef EDUBA_COLLECTIVE_BROADCAST_H_
#define EDUBA_COLLECTIVE_BROADCAST_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "collective/communicator.h"

namespace eduba {

// All ranks make the call, with as many bytes, at least one: the others' become what rank `from` has. Who has
// them hands them on, so it takes ceil(log2(ranks)) messages one after another. Errors as the communicator's.
inline absl::Status Broadcast(Communicator& group, int from, absl::Span<char> data, absl::Time deadline) {
  const int ranks = group.size();
  const int place = (group.rank() + ranks - from) % ranks;
  for (int have = 1; have < ranks; have *= 2) {
    const bool sends = place < have && place + have < ranks;
    const bool receives = have <= place && place < 2 * have;
    EDUBA_RETURN_IF_ERROR(group.SendReceive(sends ? data : absl::Span<char>(),
                                            sends ? (group.rank() + have) % ranks : -1,
                                            receives ? data : absl::Span<char>(),
                                            receives ? (group.rank() + ranks - have) % ranks : -1, deadline));
  }
  return absl::OkStatus();
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_BROADCAST_H_
