#include "worker/own_placement.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/placement.h"

namespace eduba {

absl::StatusOr<Placement> OwnPlacement(const v1::PagePlacement& given, const std::string& node, int rank,
                                       int size) {
  EDUBA_ASSIGN_OR_RETURN(Placement placement, PlacementFromProto(given));
  const int index = placement.IndexOf(node);
  if (index != rank || placement.size() != size) {
    return absl::InvalidArgumentError(absl::StrCat("the placement has node ", node, " at index ", index,
                                                   " of ", placement.size(),
                                                   ", and the group has it at rank ", rank, " of ", size));
  }
  return placement;
}

}  // namespace eduba
