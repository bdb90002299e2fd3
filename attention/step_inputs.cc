#include "attention/step_inputs.h"

#include <algorithm>
#include <iterator>

namespace eduba {

StepInputs::StepInputs(const StepArgs& common, const LayerView& view, absl::Span<const int64_t> positions,
                       int64_t length, const StepPages& pages)
    : args(common) {
  PositionRange seen{length, 0};  // By any row.
  for (const int64_t position : positions) {
    const Visibility row = VisibleTo(view, position, length);
    visible.push_back(row.keys);
    visible_sinks.push_back(row.sinks);
    if (!row.keys.empty()) seen = {std::min(seen.begin, row.keys.begin), std::max(seen.end, row.keys.end)};
  }
  args.rows = static_cast<int>(positions.size());
  args.visible = visible;
  args.visible_sinks = visible_sinks;
  args.pages = pages.keys->Pages(seen);
  if (pages.placement != nullptr) {
    std::copy_if(args.pages.begin(), args.pages.end(), std::back_inserter(owned),
                 [&](const PageRef& page) { return pages.placement->Owns(pages.index, page.index); });
    args.pages = owned;
  }
  // Every row reads the same pages, as far as it sees them.
  lists = OwnedPageLists(static_cast<int64_t>(args.pages.size()), args.rows);
  args.lists = lists.view();
  args.sink_pages = pages.sinks->Pages({0, std::min(view.sink_tokens, length)});
}

}  // namespace eduba
