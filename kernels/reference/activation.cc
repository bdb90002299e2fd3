#include "kernels/activation.h"

#include <cmath>
#include <numbers>

#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {
namespace {

double Activated(Activation kind, double x) {
  switch (kind) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGeluErf:
      return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
  }
  return 0;
}

}  // namespace

void ReferenceActivate(const ActivationArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.dim; ++i) {
      double value = Activated(args.kind, args.x[row * args.x_stride + i]);
      if (args.gate != nullptr) value *= args.gate[row * args.x_stride + i];
      args.y[row * args.dim + i] = static_cast<float>(value);
    }
  }
}

void ReferenceSoftcap(const SoftcapArgs& args) {
  for (int64_t i = 0; i < args.count; ++i) {
    const double cap = args.cap;
    args.x[i] = static_cast<float>(cap * std::tanh(args.x[i] / cap));
  }
}

}  // namespace eduba
