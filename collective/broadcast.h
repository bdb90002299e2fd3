#ifndef EDUBA_COLLECTIVE_BROADCAST_H_
#define EDUBA_COLLECTIVE_BROADCAST_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "collective/communicator.h"

namespace eduba {

// Copies the bytes of rank `from` to all other ranks. All ranks make the call with the same number of bytes,
// at least one. Every rank that has the bytes passes them on, so it takes ceil(log2(ranks)) messages one
// after another. The errors are those of the communicator.
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
