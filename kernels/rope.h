#ifndef EDUBA_KERNELS_ROPE_H_
#define EDUBA_KERNELS_ROPE_H_

#include <cstdint>

#include "absl/types/span.h"

namespace eduba {

// cosines and sines [positions, frequencies] of position * frequency (radians; Su et al., "RoFormer", 2021).
// Angles and functions in double, rounded
// once: fp32 angles are off by 0.3 rad at position 10^7.
void RopeAngles(absl::Span<const double> frequencies, absl::Span<const int64_t> positions, float* cosines,
                float* sines);

// Turns pairs (i, i + rotary_dim / 2) of each head (the halves of GPT-NeoX and of everything converted to
// Hugging Face's layout; not GPT-J's neighbours) and copies the dimensions after rotary_dim:
//   y[i] = x[i] cos - x[i + half] sin        y[i + half] = x[i + half] cos + x[i] sin
struct RopeArgs {
  int64_t rows = 0;
  int heads = 1;
  int dim = 1;  // The dimensions of a head; head h lies at h * dim.
  int rotary_dim = 0;
  const float* cosines = nullptr;  // [rows, rotary_dim / 2]
  const float* sines = nullptr;
  const float* x = nullptr;
  int64_t x_stride = 0;  // Floats from row to row.
  float* y = nullptr;    // May be x, with the same stride.
  int64_t y_stride = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_ROPE_H_
