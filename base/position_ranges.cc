#include "base/position_ranges.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace eduba {

std::vector<PositionRange> Union(std::vector<PositionRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; });
  std::vector<PositionRange> merged;
  for (const PositionRange& range : ranges) {
    if (range.empty()) continue;
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::string RangeText(PositionRange range) { return absl::StrCat("[", range.begin, ", ", range.end, ")"); }

}  // namespace eduba
