#include "rpc/placement.h"

#include "base/status_macros.h"

namespace eduba {

v1::PagePlacement PlacementToProto(const Placement& placement) {
  v1::PagePlacement proto;
  proto.set_version(placement.version);
  proto.mutable_nodes()->Add(placement.nodes.begin(), placement.nodes.end());
  proto.set_replicas(placement.replicas);
  proto.set_stripe_pages(placement.stripe_pages);
  proto.set_first(placement.first);
  return proto;
}

absl::StatusOr<Placement> PlacementFromProto(const v1::PagePlacement& proto) {
  Placement placement;
  placement.version = proto.version();
  placement.nodes.assign(proto.nodes().begin(), proto.nodes().end());
  placement.replicas = proto.replicas();
  placement.stripe_pages = proto.stripe_pages();
  placement.first = proto.first();
  EDUBA_RETURN_IF_ERROR(placement.Validate());
  return placement;
}

std::vector<v1::Extent> ExtentsOf(const Placement& placement, PositionRange range) {
  std::vector<v1::Extent> extents;
  for (const OwnedRange& part : OwnersOfRange(placement, range)) {
    v1::Extent& extent = extents.emplace_back();
    extent.set_first_position(part.range.begin);
    extent.set_count(part.range.size());
    extent.set_worker(part.owner);
  }
  return extents;
}

}  // namespace eduba
