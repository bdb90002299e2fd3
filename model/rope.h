#ifndef EDUBA_MODEL_ROPE_H_
#define EDUBA_MODEL_ROPE_H_

#include <cstdint>
#include <vector>

namespace eduba {

// Rotary position embedding of one layer. The first rotary_dim of a head's channels turn, in pairs (c, c +
// rotary_dim / 2) (transformers' "rotate half"): at position p pair c turns by p * InverseFrequencies()[c].
// The other channels stay.
struct Rope {
  // kDefault: f[c] = theta^(-2 c / rotary_dim).
  // kLinear:  f[c] / factor.
  // kLlama3:  by wavelength 2 pi / f[c]: shorter than original_positions / high_freq_factor stays f[c];
  // longer than
  //           original_positions / low_freq_factor becomes f[c] / factor; between, a linear mixture of the
  //           two.
  enum class Kind : uint8_t { kDefault, kLinear, kLlama3 };

  Kind kind = Kind::kDefault;
  double theta = 10000;
  int rotary_dim = 0;  // Even, in [2, head_dim].
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 1;
  int64_t original_positions = 0;
  bool operator==(const Rope&) const = default;
};

// [rotary_dim / 2], radians per position, in double. (transformers computes them in fp32, each within 1e-6 of
// these.)
std::vector<double> InverseFrequencies(const Rope& rope);

}  // namespace eduba

#endif  // EDUBA_MODEL_ROPE_H_
