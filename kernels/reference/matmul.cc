#include "kernels/matmul.h"

#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {

void ReferenceMultiply(const MatmulArgs& args, const float* weights) {
  const int64_t inputs = args.weights->inputs();
  const int64_t outputs = args.weights->outputs();
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = args.bias == nullptr ? 0 : args.bias[n];
      for (int64_t k = 0; k < inputs; ++k) {
        sum += static_cast<double>(args.x[row * inputs + k]) * weights[n * inputs + k];
      }
      args.y[row * outputs + n] = static_cast<float>(sum);
    }
  }
}

}  // namespace eduba
