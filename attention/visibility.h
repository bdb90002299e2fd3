#ifndef EDUBA_ATTENTION_VISIBILITY_H_
#define EDUBA_ATTENTION_VISIBILITY_H_

#include <algorithm>
#include <cstdint>

#include "base/pages.h"

namespace eduba {

enum class Policy : uint8_t { kGlobal, kWindow };

// Which keys the rows of a layer see. A row at position p sees key j when
//   kGlobal  j <= p
//   kWindow  j <= p and (j < sink_tokens or p - window < j)
struct LayerView {
  Policy policy = Policy::kGlobal;
  int64_t sink_tokens = 0;
  int64_t window = 0;  // kWindow only.
};

// What one query row sees: the first `sinks` positions, and `keys`, which begin after the token sinks.
struct Visibility {
  PositionRange keys;
  int32_t sinks = 0;
  bool operator==(const Visibility&) const = default;
};

// What a row at `position` (-1: before the first) sees of a sequence of `length` positions.
inline Visibility VisibleTo(const LayerView& view, int64_t position, int64_t length) {
  const int64_t end = std::clamp<int64_t>(position, -1, length - 1) + 1;
  Visibility visible;
  visible.sinks = static_cast<int32_t>(std::min(view.sink_tokens, end));
  visible.keys = {view.policy == Policy::kWindow ? std::max(view.sink_tokens, position - view.window + 1)
                                                 : view.sink_tokens,
                  end};
  if (visible.keys.empty()) visible.keys = {};
  return visible;
}

}  // namespace eduba

#endif  // EDUBA_ATTENTION_VISIBILITY_H_
