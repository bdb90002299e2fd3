#ifndef EDUBA_MODEL_PREFILL_PLAN_H_
#define EDUBA_MODEL_PREFILL_PLAN_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "attention/visibility.h"
#include "base/pages.h"
#include "base/placement.h"
#include "base/position_ranges.h"

namespace eduba {

// What every rank keeps of a layer once an append is done.
struct LayerKeeping {
  int64_t sink_tokens = 0;  // The first positions, ...
  int64_t window = 0;       // the last ones, such that the next row sees so many with itself, ...
  bool owned = false;       // and the pages that the rank owns: some view sees all keys.
};

// One block of a sequence-parallel prefill: the next stripes of an append, one for each rank
// (docs/adr/0007-model-sessions.md). All functions here depend on what all ranks know alone, so each rank
// knows what every other one does. Ranks are indices of the context's placement.
struct PrefillPlan {
  PositionRange positions;
  std::vector<PositionRange>
      slices;  // [ranks]: the rows of each; empty where the block has no stripe for it.

  bool operator==(const PrefillPlan&) const = default;
};

// The next block of an append whose positions `left` are still to be read; none where fewer than two ranks
// would get rows.
std::optional<PrefillPlan> PlanPrefill(PositionRange left, const Placement& placement);

// Rows that `from` computes and whose keys and values `to` needs in a layer, ascending and disjoint: those
// that the windows of the rows of `to` reach back to, and those that every rank keeps.
std::vector<PositionRange> RowsToSend(const PrefillPlan& plan, const LayerView& view,
                                      const LayerKeeping& keeping, int from, int to);

// Pages that begin in the block and that a rank has in a layer, ascending: those that it keeps, and those
// that it needs only until all rows are through the layer.
struct PrefillPages {
  std::vector<int64_t> kept, lent;
};
PrefillPages PagesFor(const PrefillPlan& plan, const LayerView& view, const LayerKeeping& keeping,
                      const Placement& placement, int rank);

}  // namespace eduba

#endif  // EDUBA_MODEL_PREFILL_PLAN_H_
