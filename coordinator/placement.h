#ifndef EDUBA_COORDINATOR_PLACEMENT_H_
#define EDUBA_COORDINATOR_PLACEMENT_H_

#include <cstdint>
#include <vector>

#include "base/pages.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Which rank owns which positions: stripe s belongs to rank s mod `ranks`. Answers do not depend on it
// (docs/numerics.md), so it may change with any release.

// The extents of `range`, in order; neighbours with the same owner are one extent.
std::vector<v1::Extent> PlaceRange(PositionRange range, int64_t stripe_pages, int ranks);

// The most extents that PlaceRange can return, without building them.
int64_t ExtentBound(PositionRange range, int64_t stripe_pages, int ranks);

// The most pages that one rank owns of `length` positions.
int64_t PagesOfBusiestRank(int64_t length, int64_t stripe_pages, int ranks);

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_PLACEMENT_H_
