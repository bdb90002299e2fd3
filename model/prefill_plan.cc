#include "model/prefill_plan.h"

#include <algorithm>
#include <array>
#include <utility>

namespace eduba {
namespace {

// Parts of the block whose keys and values a rank needs, whether it computes them or not; they may overlap.
std::array<PositionRange, 3> Needed(const PrefillPlan& plan, const LayerView& view,
                                    const LayerKeeping& keeping, int rank) {
  const PositionRange& all = plan.positions;
  const PositionRange& own = plan.slices[rank];
  const bool halo = view.policy == Policy::kWindow && !own.empty();
  return {PositionRange{0, keeping.sink_tokens}.Intersect(all),
          halo ? PositionRange{own.begin - view.window + 1, own.begin}.Intersect(all) : PositionRange{},
          keeping.window > 0 ? PositionRange{all.end - keeping.window + 1, all.end}.Intersect(all)
                             : PositionRange{}};
}

}  // namespace

std::optional<PrefillPlan> PlanPrefill(PositionRange left, const Placement& placement) {
  PrefillPlan plan;
  plan.slices.resize(placement.size());
  const int64_t stripe_rows = placement.stripe_pages * kPageRows;
  const int64_t first = StripeOf(left.begin, placement.stripe_pages);
  int with_rows = 0;
  for (int64_t stripe = first; stripe < first + placement.size(); ++stripe) {
    const PositionRange slice =
        PositionRange{stripe * stripe_rows, (stripe + 1) * stripe_rows}.Intersect(left);
    if (slice.empty()) break;
    plan.slices[placement.OwnerOfStripe(stripe)] = slice;
    plan.positions = {left.begin, slice.end};
    ++with_rows;
  }
  if (with_rows < 2) return std::nullopt;
  return plan;
}

std::vector<PositionRange> RowsToSend(const PrefillPlan& plan, const LayerView& view,
                                      const LayerKeeping& keeping, int from, int to) {
  std::vector<PositionRange> rows;
  if (from == to) return rows;
  for (const PositionRange& needed : Needed(plan, view, keeping, to)) {
    rows.push_back(needed.Intersect(plan.slices[from]));
  }
  return Union(std::move(rows));
}

PrefillPages PagesFor(const PrefillPlan& plan, const LayerView& view, const LayerKeeping& keeping,
                      const Placement& placement, int rank) {
  const PositionRange& all = plan.positions;
  std::array<PositionRange, 4> used;
  const std::array<PositionRange, 3> needed = Needed(plan, view, keeping, rank);
  std::copy(needed.begin(), needed.end(), used.begin());
  used[3] = plan.slices[rank];
  const int64_t window_begin = std::max<int64_t>(0, all.end - keeping.window + 1);
  PrefillPages pages;
  for (int64_t page = PageCount(all.begin); page < PageCount(all.end); ++page) {
    const bool kept = page < PageCount(keeping.sink_tokens) ||
                      (keeping.owned && placement.Owns(rank, page)) ||
                      (keeping.window > 0 && page >= PageOf(window_begin));
    const PositionRange positions = {PageBegin(page), PageBegin(page + 1)};
    if (kept) {
      pages.kept.push_back(page);
    } else if (std::any_of(used.begin(), used.end(),
                           [&](const PositionRange& range) { return !range.Intersect(positions).empty(); })) {
      pages.lent.push_back(page);
    }
  }
  return pages;
}

}  // namespace eduba
