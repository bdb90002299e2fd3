#include "model/rope.h"

#include <cmath>
#include <numbers>

#include "base/check.h"

namespace eduba {
namespace {

double Llama3Frequency(const Rope& rope, double frequency) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const auto original = static_cast<double>(rope.original_positions);
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  const double kept =
      (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - kept) * frequency / rope.factor + kept * frequency;
}

}  // namespace

std::vector<double> InverseFrequencies(const Rope& rope) {
  EDUBA_CHECK(rope.rotary_dim >= 2 && rope.rotary_dim % 2 == 0);
  std::vector<double> frequencies(rope.rotary_dim / 2);
  for (size_t c = 0; c < frequencies.size(); ++c) {
    const double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(c) / rope.rotary_dim);
    switch (rope.kind) {
      case Rope::Kind::kDefault:
        frequencies[c] = frequency;
        break;
      case Rope::Kind::kLinear:
        frequencies[c] = frequency / rope.factor;
        break;
      case Rope::Kind::kLlama3:
        frequencies[c] = Llama3Frequency(rope, frequency);
        break;
    }
  }
  return frequencies;
}

}  // namespace eduba
