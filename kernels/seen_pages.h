#ifndef EDUBA_KERNELS_SEEN_PAGES_H_
#define EDUBA_KERNELS_SEEN_PAGES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// Rows [begin, end) of a page.
struct PageRows {
  int16_t begin = 0;
  int16_t end = 0;

  bool empty() const { return begin >= end; }
  bool operator==(const PageRows&) const = default;
};

// `rows` without the dead rows at both ends; {0, 0} where none is live. `live` as PageRef::live.
PageRows TrimToLive(PageRows rows, const uint64_t* live);

// What the rows of one step see of this worker's pages: lists, visible ranges and live masks put together.
class SeenPages {
 public:
  // REQUIRES: ValidateStep(args) is OK. `visible` [rows]: args.visible without positions that do not exist;
  // it outlives this, and so does what `args` points to.
  SeenPages(const StepArgs& args, absl::Span<const PositionRange> visible);

  // The pages of which some row sees a live row, in the order of args.pages. A page's place here is its slot.
  const std::vector<PageRef>& pages() const { return pages_; }
  // The smallest range that holds all that query row `row` sees of the page of a slot. Dead rows inside it
  // are not seen; the first and the last row are live. {0, 0} where the row sees nothing of the page.
  PageRows RowsOf(int64_t row, int64_t slot) const {
    const PageRows listed = list_rows_[row_list_[row] * static_cast<int64_t>(pages_.size()) + slot];
    const PageRef& page = pages_[slot];
    const int64_t begin = std::max<int64_t>(listed.begin, visible_[row].begin - PageBegin(page.index));
    const int64_t end = std::min<int64_t>(listed.end, visible_[row].end - PageBegin(page.index));
    if (begin >= end) return {};
    const PageRows rows{static_cast<int16_t>(begin), static_cast<int16_t>(end)};
    return page.live == nullptr ? rows : TrimToLive(rows, page.live);
  }
  // [lists, slots]: what each list has of each page; {0, 0} where it does not name the page.
  absl::Span<const PageRows> list_rows() const { return list_rows_; }
  // Live rows of pages that some query row sees, each counted once.
  int64_t row_count() const { return row_count_; }

 private:
  absl::Span<const PositionRange> visible_;
  absl::Span<const int32_t> row_list_;
  std::vector<PageRef> pages_;
  std::vector<PageRows> list_rows_;
  int64_t row_count_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_SEEN_PAGES_H_
