#ifndef EDUBA_WORKER_OWN_PLACEMENT_H_
#define EDUBA_WORKER_OWN_PLACEMENT_H_

#include <string>

#include "absl/status/statusor.h"
#include "base/placement.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// The placement of a session that node `node`, which is rank `rank` of `size`, is told to open. While a group
// reduces together, its nodes are those of the placement in the same order. INVALID_ARGUMENT otherwise, and
// as Placement::Validate.
absl::StatusOr<Placement> OwnPlacement(const v1::PagePlacement& given, const std::string& node, int rank,
                                       int size);

}  // namespace eduba

#endif  // EDUBA_WORKER_OWN_PLACEMENT_H_
