#ifndef EDUBA_KERNELS_NORM_H_
#define EDUBA_KERNELS_NORM_H_

#include <cstdint>

namespace eduba {

enum class NormKind : uint8_t {
  kRms,    // y = x / sqrt(mean(x^2) + epsilon) * (weight_offset + weight)
  kLayer,  // y = (x - mean) / sqrt(variance + epsilon) * (weight_offset + weight) + bias
};

// Normalises vectors of `dim` numbers: `heads` of them in each of `rows` rows, head h at h * dim. Means and
// variances are summed in fp32 pieces and double; a vector's bits depend on that vector alone. (Zhang and
// Sennrich, "Root Mean Square Layer Normalization", 2019; Ba et al., "Layer Normalization", 2016.)
struct NormArgs {
  NormKind kind = NormKind::kRms;
  int64_t rows = 0;
  int heads = 1;
  int dim = 1;
  const float* x = nullptr;
  int64_t x_stride = 0;  // Floats from row to row.
  float* y = nullptr;    // May be x, with the same stride.
  int64_t y_stride = 0;
  const float* weight = nullptr;  // [dim]
  float weight_offset = 0;        // 1 where files keep the weight's distance from 1 (Gemma).
  const float* bias = nullptr;    // [dim], or none
  float epsilon = 1e-6F;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_NORM_H_
