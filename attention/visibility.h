#ifndef EDUBA_ATTENTION_VISIBILITY_H_
#define EDUBA_ATTENTION_VISIBILITY_H_

#include <algorithm>
#include <cstdint>

#include "base/pages.h"

namespace eduba {

enum class Policy : uint8_t { kGlobal, kWindow };

// What one query row sees: the first `sinks` positions, and `keys`, which begin behind the token sinks.
struct Visibility {
  PositionRange keys;
  int32_t sinks = 0;
  bool operator==(const Visibility&) const = default;
};

// A row at `position` (-1: before the first) of a sequence of `length` positions whose first `sink_tokens`
// are token sinks:
//   kGlobal  j <= position
//   kWindow  (j < sink_tokens or position - window < j) and j <= position
inline Visibility VisibleTo(Policy policy, int64_t position, int64_t sink_tokens, int64_t window,
                            int64_t length) {
  const int64_t end = std::clamp<int64_t>(position, -1, length - 1) + 1;
  Visibility visible;
  visible.sinks = static_cast<int32_t>(std::min(sink_tokens, end));
  visible.keys = {policy == Policy::kWindow ? std::max(sink_tokens, position - window + 1) : sink_tokens,
                  end};
  if (visible.keys.empty()) visible.keys = {};
  return visible;
}

}  // namespace eduba

#endif  // EDUBA_ATTENTION_VISIBILITY_H_
