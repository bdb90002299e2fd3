#include "kernels/rope.h"

#include <cmath>

namespace eduba {

void RopeAngles(absl::Span<const double> frequencies, absl::Span<const int64_t> positions, float* cosines,
                float* sines) {
  for (const int64_t position : positions) {
    for (const double frequency : frequencies) {
      const double angle = static_cast<double>(position) * frequency;
      *cosines++ = static_cast<float>(std::cos(angle));
      *sines++ = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace eduba
