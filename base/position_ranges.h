#ifndef EDUBA_BASE_POSITION_RANGES_H_
#define EDUBA_BASE_POSITION_RANGES_H_

#include <string>
#include <vector>

#include "base/pages.h"

namespace eduba {

// The positions that are in any of `ranges`: ascending, disjoint, none empty, ranges that touch made one.
std::vector<PositionRange> Union(std::vector<PositionRange> ranges);

// "[begin, end)", as messages name a range.
std::string RangeText(PositionRange range);

}  // namespace eduba

#endif  // EDUBA_BASE_POSITION_RANGES_H_
