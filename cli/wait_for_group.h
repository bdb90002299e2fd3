#ifndef EDUBA_CLI_WAIT_FOR_GROUP_H_
#define EDUBA_CLI_WAIT_FOR_GROUP_H_

#include <string>

#include "absl/status/statusor.h"

namespace eduba {

// Returns true once the group of the coordinator at `address` is complete; false when SIGTERM or SIGINT, held
// by HoldSignals, came before. DEADLINE_EXCEEDED when a minute was not enough, UNAVAILABLE when a child
// process ended meanwhile.
absl::StatusOr<bool> WaitForGroup(const std::string& address);

}  // namespace eduba

#endif  // EDUBA_CLI_WAIT_FOR_GROUP_H_
