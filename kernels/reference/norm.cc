#include "kernels/norm.h"

#include <cmath>

#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {

void ReferenceNormalise(const NormArgs& args) {
  for (int64_t vector = 0; vector < args.rows * args.heads; ++vector) {
    const int64_t offset = vector % args.heads * args.dim;
    const float* x = args.x + vector / args.heads * args.x_stride + offset;
    float* y = args.y + vector / args.heads * args.y_stride + offset;
    double mean = 0;
    for (int i = 0; i < args.dim && args.kind == NormKind::kLayer; ++i) mean += x[i];
    mean /= args.dim;
    double variance = 0;
    for (int i = 0; i < args.dim; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const double factor = 1 / std::sqrt(variance / args.dim + static_cast<double>(args.epsilon));
    for (int i = 0; i < args.dim; ++i) {
      const double weight = static_cast<double>(args.weight_offset) + args.weight[i];
      const double bias = args.bias == nullptr ? 0 : args.bias[i];
      y[i] = static_cast<float>((x[i] - mean) * factor * weight + bias);
    }
  }
}

}  // namespace eduba
