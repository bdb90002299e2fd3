#ifndef EDUBA_RPC_PLACEMENT_H_
#define EDUBA_RPC_PLACEMENT_H_

#include <vector>

#include "absl/status/statusor.h"
#include "base/placement.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

v1::PagePlacement PlacementToProto(const Placement& placement);

// INVALID_ARGUMENT as Placement::Validate.
absl::StatusOr<Placement> PlacementFromProto(const v1::PagePlacement& proto);

// The parts of `range` by owner, in order, as plans and BeginAppend name them.
std::vector<v1::Extent> ExtentsOf(const Placement& placement, PositionRange range);

}  // namespace eduba

#endif  // EDUBA_RPC_PLACEMENT_H_
