#include "kernels/rope.h"

#include <cmath>
#include <numbers>

#include "base/check.h"

namespace eduba {

std::vector<double> RopeFrequencies(const RopeSpec& spec) {
  EDUBA_CHECK(spec.rotary_dim >= 0 && spec.rotary_dim % 2 == 0);
  std::vector<double> frequencies(spec.rotary_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(spec.base, -2.0 * static_cast<double>(i) / spec.rotary_dim);
    switch (spec.scaling) {
      case RopeScaling::kNone:
        break;
      case RopeScaling::kLinear:
        frequency /= spec.factor;
        break;
      case RopeScaling::kLlama3: {
        // How many turns the trained length holds decides: above `high` nothing, below `low` all.
        const double turns = spec.original_positions * frequency / (2 * std::numbers::pi);
        const double low = spec.low_frequency_factor;
        const double high = spec.high_frequency_factor;
        if (turns < low) {
          frequency /= spec.factor;
        } else if (turns <= high) {
          const double keep = (turns - low) / (high - low);
          frequency = (1 - keep) * frequency / spec.factor + keep * frequency;
        }
        break;
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

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
