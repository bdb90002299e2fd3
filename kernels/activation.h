#ifndef EDUBA_KERNELS_ACTIVATION_H_
#define EDUBA_KERNELS_ACTIVATION_H_

#include <cstdint>

namespace eduba {

enum class Activation : uint8_t {
  kSilu,      // x / (1 + exp(-x))
  kGeluErf,   // x * Phi(x), Phi the normal distribution ("gelu" with erf)
  kGeluTanh,  // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
};

// y = activation(x), times `gate` where there is one. Element by element, within 1e-6 |x gate|.
struct ActivationArgs {
  Activation kind = Activation::kSilu;
  int64_t rows = 0;
  int64_t dim = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;         // Floats from row to row.
  const float* gate = nullptr;  // Multiplies the activation, or none. Its row stride is x_stride too.
  float* y = nullptr;           // [rows, dim]; may be x or gate where x_stride == dim.
};

// x[i] = cap * tanh(x[i] / cap), within 1e-6 cap. REQUIRES: cap > 0.
struct SoftcapArgs {
  int64_t count = 0;
  float* x = nullptr;
  float cap = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_ACTIVATION_H_
