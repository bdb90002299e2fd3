#ifndef EDUBA_MODEL_WAVE_PLAN_H_
#define EDUBA_MODEL_WAVE_PLAN_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "base/pages.h"
#include "base/position_ranges.h"
#include "model/kv_pages.h"
#include "model/paged_attention.h"

namespace eduba {

// What every rank keeps of a layer behind an append.
struct LayerKeeping {
  int64_t sink_tokens = 0;  // The first positions, ...
  int64_t window = 0;       // the last ones, such that the next row sees so many with itself, ...
  bool owned = false;       // and the pages that the rank owns: some view sees all keys.
};

// A wave: the next stripes of an append, one for each rank (docs/adr/0007-model-sessions.md). All functions
// here are of what all ranks know, so each rank knows what every other does.
struct WavePlan {
  PositionRange positions;
  std::vector<PositionRange> slices;  // [ranks]: the rows of each; empty where the wave has no stripe for it.

  bool operator==(const WavePlan&) const = default;
};

// The next wave of an append that has positions `left` before it; none where two ranks would not get rows.
std::optional<WavePlan> PlanWave(PositionRange left, int ranks, int64_t stripe_pages);

// Rows that `from` computes and whose keys and values `to` needs in a layer, ascending and apart: those ahead
// of its own that its windows see, and those that every rank keeps.
std::vector<PositionRange> RowsToSend(const WavePlan& plan, const LayerView& view,
                                      const LayerKeeping& keeping, int from, int to);

// Pages that begin in the wave and that a rank has in a layer, ascending: those that it keeps, and those that
// it needs only until all rows are through the layer.
struct WavePages {
  std::vector<int64_t> kept, lent;
};
WavePages PagesFor(const WavePlan& plan, const LayerView& view, const LayerKeeping& keeping,
                   const PageShare& share);

}  // namespace eduba

#endif  // EDUBA_MODEL_WAVE_PLAN_H_
