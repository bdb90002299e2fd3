#include "coordinator/placement.h"

#include <algorithm>

namespace eduba {

std::vector<v1::Extent> PlaceRange(PositionRange range, int64_t stripe_pages, int ranks) {
  const int64_t stripe_rows = stripe_pages * kPageRows;
  std::vector<v1::Extent> extents;
  for (int64_t begin = range.begin; begin < range.end;) {
    const int64_t stripe = StripeOf(begin, stripe_pages);
    const int64_t end = std::min(range.end, (stripe + 1) * stripe_rows);
    const int owner = static_cast<int>(stripe % ranks);
    if (!extents.empty() && extents.back().worker() == owner) {
      extents.back().set_count(extents.back().count() + end - begin);
    } else {
      v1::Extent& extent = extents.emplace_back();
      extent.set_first_position(begin);
      extent.set_count(end - begin);
      extent.set_worker(owner);
    }
    begin = end;
  }
  return extents;
}

int64_t ExtentBound(PositionRange range, int64_t stripe_pages, int ranks) {
  if (range.empty()) return 0;
  if (ranks == 1) return 1;
  return StripeOf(range.end - 1, stripe_pages) - StripeOf(range.begin, stripe_pages) + 1;
}

int64_t PagesOfBusiestRank(int64_t length, int64_t stripe_pages, int ranks) {
  const int64_t pages = PageCount(length);
  const int64_t stripes = (pages + stripe_pages - 1) / stripe_pages;
  return std::min(pages, (stripes + ranks - 1) / ranks * stripe_pages);
}

}  // namespace eduba
