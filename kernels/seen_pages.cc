#include "kernels/seen_pages.h"

#include <algorithm>
#include <utility>

#include "base/position_ranges.h"
#include "kernels/row_set.h"

namespace eduba {
namespace {

// Adds to `set` what `ranges` (ascending, disjoint) and `listed` have in common of page `index`.
void AddCommon(const std::vector<PositionRange>& ranges, PageRows listed, int64_t index, RowSet& set) {
  if (listed.empty()) return;
  const int64_t first = PageBegin(index);
  // The first range that ends after the page's first position.
  auto range = std::upper_bound(ranges.begin(), ranges.end(), first,
                                [](int64_t position, const PositionRange& r) { return position < r.end; });
  for (; range != ranges.end() && range->begin < first + kPageRows; ++range) {
    set.Add(std::max<int64_t>(range->begin - first, listed.begin),
            std::min<int64_t>(range->end - first, listed.end));
  }
}

}  // namespace

PageRows TrimToLive(PageRows rows, const uint64_t* live) {
  while (!rows.empty() && !IsLive(live, rows.begin)) ++rows.begin;
  while (!rows.empty() && !IsLive(live, rows.end - 1)) --rows.end;
  return rows.empty() ? PageRows{} : rows;
}

SeenPages::SeenPages(const StepArgs& args, absl::Span<const PositionRange> visible)
    : visible_(visible), row_list_(args.lists.row_list) {
  const auto lists = static_cast<int64_t>(args.lists.indptr.size()) - 1;
  const auto pages = static_cast<int64_t>(args.pages.size());
  std::vector<std::vector<PositionRange>> ranges(lists);  // What some row of the list may see.
  for (size_t row = 0; row < visible.size(); ++row) ranges[row_list_[row]].push_back(visible[row]);
  for (std::vector<PositionRange>& of_list : ranges) of_list = Union(std::move(of_list));

  std::vector<PageRows> listed(lists * pages);
  for (int64_t list = 0; list < lists; ++list) {
    for (int32_t i = args.lists.indptr[list]; i < args.lists.indptr[list + 1]; ++i) {
      const ListedPage& entry = args.lists.entries[i];
      listed[list * pages + entry.page] = {entry.begin, entry.end};
    }
  }

  std::vector<int64_t> seen;  // Indexes into args.pages.
  for (int64_t page = 0; page < pages; ++page) {
    RowSet rows;
    for (int64_t list = 0; list < lists; ++list) {
      AddCommon(ranges[list], listed[list * pages + page], args.pages[page].index, rows);
    }
    if (args.pages[page].live != nullptr) rows.Keep(args.pages[page].live);
    const int64_t count = rows.count();
    if (count == 0) continue;
    row_count_ += count;
    seen.push_back(page);
    pages_.push_back(args.pages[page]);
  }
  if (static_cast<int64_t>(seen.size()) == pages) {
    list_rows_ = std::move(listed);
    return;
  }
  list_rows_.reserve(lists * seen.size());
  for (int64_t list = 0; list < lists; ++list) {
    for (const int64_t page : seen) list_rows_.push_back(listed[list * pages + page]);
  }
}

}  // namespace eduba
