#include "model/context.h"

#include <algorithm>

namespace eduba {

int64_t SinkPosition(const ContextOptions& options, int64_t position) {
  switch (options.positions) {
    case PositionMode::kAbsolute:
      return position;
    case PositionMode::kRolling:
      return std::min(position, options.sink_tokens + options.window - 1);
    case PositionMode::kClamped:
      return std::min(position, options.clamp);
  }
  return position;
}

bool Context::every_layer_sees_a_window() const {
  return std::none_of(keeping_.begin(), keeping_.end(),
                      [](const LayerKeeping& keeping) { return keeping.owned; });
}

void Context::Clear() {
  pages_.Truncate(0);
  length_ = 0;
  last_.clear();
}

}  // namespace eduba
