#include "benchmarks/measure/matrix_rates.h"

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "benchmarks/measure/timing.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/layer_kernels.h"
#include "kernels/matmul.h"

namespace eduba {
namespace {

constexpr int64_t kSize = 1024;

class OwnProduct {
 public:
  OwnProduct(int threads, DType dtype, Activations activations)
      : kernels_(MakeCpuLayerKernels(threads, activations)), x_(kSize * kSize), y_(kSize * kSize) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<char> weights(kSize * kSize * DTypeBytes(dtype));
    for (int64_t i = 0; i < kSize * kSize; ++i) StoreElement(weights.data(), dtype, i, normal(random));
    for (float& x : x_) x = normal(random);
    weights_ = kernels_->Pack({{weights.data(), dtype, kSize, kSize}}).value();
  }

  double Gflops() {
    const double seconds = Seconds([&] {
      kernels_->Multiply({weights_.get(), kSize, x_.data(), nullptr, y_.data()});
    });
    return 2e-9 * kSize * kSize * kSize / seconds;
  }

 private:
  std::unique_ptr<LayerKernels> kernels_;
  std::vector<float> x_;
  std::vector<float> y_;
  std::unique_ptr<PackedMatrix> weights_;
};

}  // namespace

MatrixRates OwnMatrixRates(int threads) {
  const auto f32 = std::make_shared<OwnProduct>(threads, DType::kF32, Activations::kF32);
  const auto bf16 = std::make_shared<OwnProduct>(threads, DType::kBf16, Activations::kBf16);
  return {[f32] { return f32->Gflops(); }, [bf16] { return bf16->Gflops(); }};
}

}  // namespace eduba
