#include "kernels/rope.h"

#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {

void ReferenceRotate(const RopeArgs& args) {
  const int half = args.rotary_dim / 2;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const float* x = args.x + row * args.x_stride + head * args.dim;
      float* y = args.y + row * args.y_stride + head * args.dim;
      for (int i = 0; i < half; ++i) {
        const double c = args.cosines[row * half + i];
        const double s = args.sines[row * half + i];
        const double a = x[i];
        const double b = x[half + i];
        y[i] = static_cast<float>(a * c - b * s);
        y[half + i] = static_cast<float>(b * c + a * s);
      }
      for (int i = args.rotary_dim; i < args.dim; ++i) y[i] = x[i];
    }
  }
}

}  // namespace eduba
