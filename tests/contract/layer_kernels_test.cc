// The contract of kernels/layer_kernels.h, for every backend: the reference, the CPU kernels on each
// instruction set this machine runs, the GPU's kernels emulated on the host over a fake cuBLASLt, and a GPU
// where there is one.

#include "kernels/layer_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_layer_kernels.h"
#include "kernels/cuda/emulated_device.h"
#include "kernels/cuda/fake_cublaslt.h"
#include "kernels/layer_fingerprint.h"
#include "kernels/reference/reference_layer_kernels.h"
#include "kernels/testing/on_host.h"

namespace eduba {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t kEmulatedBytes = int64_t{1} << 30;

std::unique_ptr<LayerKernels> EmulatedCuda(Activations activations = Activations::kF32) {
  return *MakeCudaLayerKernelsWith(cuda::MakeEmulatedDevice(kEmulatedBytes), cuda::FakeCublasLtApi(),
                                   activations);
}

absl::StatusOr<std::unique_ptr<LayerKernels>> OpenCuda(Activations activations = Activations::kF32) {
  auto device = cuda::OpenCudaDevice(0);
  if (!device.ok()) return device.status();
  return MakeCudaLayerKernels(*std::move(device), activations);
}

// Why this machine cannot run the cuda kernels; OK where it can.
const absl::Status& CudaMissing() {
  static const absl::Status* const status = new absl::Status(OpenCuda().status());
  return *status;
}

std::unique_ptr<LayerKernels> OnHost(std::unique_ptr<LayerKernels> kernels) {
  return std::make_unique<testing::OnHost>(std::move(kernels));
}

struct KernelsChoice {
  std::string name;
  std::function<std::unique_ptr<LayerKernels>(int threads)> make;
  Activations activations = Activations::kF32;
};

std::ostream& operator<<(std::ostream& out, const KernelsChoice& choice) { return out << choice.name; }

std::vector<KernelsChoice> AllKernels() {
  std::vector<KernelsChoice> all = {{"reference", [](int) { return MakeReferenceLayerKernels(); }}};
  for (const std::string& target : CpuTargets()) {
    all.push_back(
        {"cpu_" + target, [target](int threads) { return MakeCpuLayerKernelsForTest(threads, target); }});
    all.push_back(
        {"cpu_" + target + "_bf16",
         [target](int threads) { return MakeCpuLayerKernelsForTest(threads, target, Activations::kBf16); },
         Activations::kBf16});
  }
  // With the dot products that this machine may have.
  all.push_back({"cpu_bf16", [](int threads) { return MakeCpuLayerKernels(threads, Activations::kBf16); },
                 Activations::kBf16});
  all.push_back({"reference_bf16", [](int) { return MakeReferenceLayerKernels(Activations::kBf16); },
                 Activations::kBf16});
  for (const Activations activations : {Activations::kF32, Activations::kBf16}) {
    const std::string suffix = activations == Activations::kBf16 ? "_bf16" : "";
    if (cuda::EmulatedDeviceRuns()) {
      all.push_back({"cuda_emulated" + suffix,
                     [activations](int) { return OnHost(EmulatedCuda(activations)); }, activations});
    }
    all.push_back(
        {"cuda" + suffix, [activations](int) { return OnHost(*OpenCuda(activations)); }, activations});
  }
  return all;
}

class LayerKernelsContract : public ::testing::TestWithParam<KernelsChoice> {
 protected:
  void SetUp() override {
    const bool is_gpu = GetParam().name == "cuda" || GetParam().name == "cuda_bf16";
    if (is_gpu && !CudaMissing().ok()) GTEST_SKIP() << "SKIPPED, NOT TESTED: cuda: " << CudaMissing();
  }
  std::unique_ptr<LayerKernels> Make(int threads = 2) { return GetParam().make(threads); }
};

INSTANTIATE_TEST_SUITE_P(All, LayerKernelsContract, ::testing::ValuesIn(AllKernels()),
                         [](const auto& info) { return info.param.name; });

TEST(LayerKernels, AreTheTargetsOfTheAttentionKernels) {
  EXPECT_EQ(AllKernels().size(), 2 * CpuTargets().size() + 3 + (cuda::EmulatedDeviceRuns() ? 4 : 2));
  EXPECT_EQ(MakeCpuLayerKernels(1)->name(), "cpu/" + CpuTargets().front());
}

// Same numbers for the same seed, of both signs.
std::vector<float> Numbers(size_t count, uint64_t seed, float size = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, size);
  std::vector<float> numbers(count);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

bool SameBits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

// ---- products

struct Product {
  uint64_t seed;
  DType dtype;
  std::vector<int64_t> outputs;  // The outputs of each part.
  int64_t inputs;
  int64_t rows;
  bool bias;

  std::string ToString() const {
    return absl::StrCat("{seed=", seed, " dtype=", DTypeName(dtype),
                        " outputs=", ::testing::PrintToString(outputs), " inputs=", inputs, " rows=", rows,
                        " bias=", bias, "}");
  }
  int64_t all_outputs() const {
    int64_t sum = 0;
    for (const int64_t n : outputs) sum += n;
    return sum;
  }
  std::vector<float> X() const { return Numbers(rows * inputs, seed); }
  std::vector<float> Bias() const { return Numbers(all_outputs(), seed + 1); }
  // [all outputs, inputs], rounded to the type.
  std::vector<char> Weights() const {
    const std::vector<float> numbers = Numbers(all_outputs() * inputs, seed + 2);
    std::vector<char> bytes(numbers.size() * DTypeBytes(dtype));
    for (size_t i = 0; i < numbers.size(); ++i) {
      StoreElement(bytes.data(), dtype, static_cast<int64_t>(i), numbers[i]);
    }
    return bytes;
  }
};

Product RandomProduct(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[random() % sizeof...(options)];
  };
  Product p;
  p.seed = seed;
  p.dtype = pick(DType::kF32, DType::kBf16, DType::kF16);
  for (int parts = pick(1, 1, 2, 3); parts > 0; --parts) {
    p.outputs.push_back(pick(1, 3, 16, 31, 32, 33, 64, 97, 128));
  }
  p.inputs = pick(1, 2, 17, 64, 127, 255, 256, 257, 512, 769);
  p.rows = pick(1, 1, 2, 3, 6, 7, 8, 11, 12, 13, 25, 96, 97);
  p.bias = pick(false, true);
  return p;
}

std::unique_ptr<PackedMatrix> Pack(LayerKernels& kernels, const Product& p,
                                   const std::vector<char>& weights) {
  std::vector<MatrixView> parts;
  int64_t at = 0;
  for (const int64_t n : p.outputs) {
    parts.push_back(
        {weights.data() + at * p.inputs * static_cast<int64_t>(DTypeBytes(p.dtype)), p.dtype, n, p.inputs});
    at += n;
  }
  auto packed = kernels.Pack(parts);
  EXPECT_TRUE(packed.ok()) << packed.status();
  return std::move(packed).value();
}

std::vector<float> Multiply(LayerKernels& kernels, const PackedMatrix& weights, const float* x, int64_t rows,
                            const float* bias) {
  std::vector<float> y(rows * weights.outputs() + 1, kNaN);  // One number after the end, to see it stay.
  kernels.Multiply({&weights, rows, x, bias, y.data()});
  EXPECT_TRUE(std::isnan(y.back()));
  y.pop_back();
  return y;
}

TEST_P(LayerKernelsContract, ProductsMatchTheirDefinition) {
  const auto kernels = Make();
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    const Product p = RandomProduct(seed);
    SCOPED_TRACE(p.ToString());
    const std::vector<char> weights = p.Weights();
    const std::vector<float> x = p.X();
    const std::vector<float> bias = p.Bias();
    const auto packed = Pack(*kernels, p, weights);
    EXPECT_EQ(packed->outputs(), p.all_outputs());
    EXPECT_EQ(packed->inputs(), p.inputs);
    const auto y = Multiply(*kernels, *packed, x.data(), p.rows, p.bias ? bias.data() : nullptr);
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t n = 0; n < p.all_outputs(); ++n) {
        double sum = p.bias ? bias[n] : 0;
        double size = std::abs(sum);
        for (int64_t k = 0; k < p.inputs; ++k) {
          const bool rounded = GetParam().activations == Activations::kBf16 && p.dtype == DType::kBf16;
          const float value = x[row * p.inputs + k];
          const double term = static_cast<double>(rounded ? F32FromBf16(Bf16FromF32(value)) : value) *
                              LoadElement(weights.data(), p.dtype, n * p.inputs + k);
          sum += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(y[row * p.all_outputs() + n], sum, 1e-6 * size) << "row " << row << " output " << n;
      }
    }
  }
}

// A row's bits: whatever else is in its batch, for any number of threads.
TEST_P(LayerKernelsContract, AProductsRowIsTheSameInEveryBatchFrom1To512) {
  const auto one = Make(1);
  const auto three = Make(3);
  const bool reference = GetParam().name.rfind("reference", 0) == 0;
  const bool emulated = GetParam().name.rfind("cuda_emulated", 0) == 0;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const Product p{7, dtype, {200, 100}, 520, reference ? 20 : emulated ? 50 : 512, true};
    SCOPED_TRACE(p.ToString());
    const std::vector<char> weights = p.Weights();
    const std::vector<float> x = p.X();
    const std::vector<float> bias = p.Bias();
    const auto packed_one = Pack(*one, p, weights);
    const auto packed_three = Pack(*three, p, weights);
    const auto all = Multiply(*one, *packed_one, x.data(), p.rows, bias.data());
    const int64_t outputs = p.all_outputs();
    for (int64_t rows = 1; rows <= p.rows; rows = rows < (emulated ? 3 : 40) ? rows + 1 : rows * 3 / 2) {
      const int64_t first = p.rows - rows;
      for (LayerKernels* kernels : {one.get(), three.get()}) {
        const auto& packed = kernels == one.get() ? *packed_one : *packed_three;
        const auto some = Multiply(*kernels, packed, x.data() + first * p.inputs, rows, bias.data());
        ASSERT_TRUE(SameBits(some.data(), all.data() + first * outputs, rows * outputs))
            << rows << " rows, " << (kernels == one.get() ? 1 : 3) << " threads";
      }
    }
  }
}

// Any finite number there is, subnormal ones among them, whose sums overflow now and then.
TEST(CpuLayerKernels, RoundedActivationsGiveTheBitsOfTheChipsDotProductsOnEveryTargetThatFuses) {
  if (MultiplyPanelByDotProducts() == nullptr) GTEST_SKIP() << "this machine has no AVX512_BF16";
  const auto chip = MakeCpuLayerKernels(2, Activations::kBf16);
  for (const std::string& target : CpuTargets()) {
    if (!CpuTargetHasFma(target)) continue;
    const auto emulated = MakeCpuLayerKernelsForTest(2, target, Activations::kBf16);
    for (uint64_t seed = 1; seed <= 100; ++seed) {
      Product p = RandomProduct(seed);
      p.dtype = DType::kBf16;
      SCOPED_TRACE(absl::StrCat(target, " ", p.ToString()));
      std::mt19937_64 random(seed);
      const auto any = [&] {
        const auto bits = static_cast<uint32_t>(random());
        const float x = std::bit_cast<float>(bits);
        return std::isfinite(x) ? x : std::bit_cast<float>(bits & 0x007fffffU);
      };
      std::vector<float> x(p.rows * p.inputs);
      for (float& value : x) value = seed % 2 == 0 ? any() : std::ldexp(any(), -60);
      std::vector<char> weights(p.all_outputs() * p.inputs * 2);
      for (int64_t i = 0; i < p.all_outputs() * p.inputs; ++i) {
        StoreElement(weights.data(), DType::kBf16, i, std::ldexp(any(), -60));
      }
      const std::vector<float> bias = p.Bias();
      const auto a = Multiply(*chip, *Pack(*chip, p, weights), x.data(), p.rows, bias.data());
      const auto b = Multiply(*emulated, *Pack(*emulated, p, weights), x.data(), p.rows, bias.data());
      for (size_t i = 0; i < a.size(); ++i) {
        ASSERT_TRUE(SameBits(&a[i], &b[i], 1) || (std::isnan(a[i]) && std::isnan(b[i])))
            << i << ": " << a[i] << " and " << b[i];
      }
    }
  }
}

TEST(CpuLayerKernels, RoundedActivationsFlushWhatIsAddedToDotProductsToo) {
  const auto chip = MakeCpuLayerKernels(1, Activations::kBf16);
  for (const std::string& target : CpuTargets()) {
    const auto emulated = MakeCpuLayerKernelsForTest(1, target, Activations::kBf16);
    for (LayerKernels* kernels : {chip.get(), emulated.get()}) {
      // Two blocks of inputs, whose sums are normal and leave a subnormal difference; and a subnormal bias.
      const Product p{1, DType::kBf16, {1}, 257, 1, true};
      std::vector<char> weights(p.inputs * 2, 0);
      std::vector<float> x(p.inputs, 0);
      x[0] = x[256] = 0x1p-63F;
      StoreElement(weights.data(), DType::kBf16, 0, 0x1.8p-63F);
      StoreElement(weights.data(), DType::kBf16, 256, -0x1p-63F);
      const auto packed = Pack(*kernels, p, weights);
      const float none = 0;
      EXPECT_EQ(Multiply(*kernels, *packed, x.data(), 1, &none)[0], 0) << target;
      std::fill(x.begin(), x.end(), 0.0F);
      const float subnormal = 0x1p-130F;
      EXPECT_EQ(Multiply(*kernels, *packed, x.data(), 1, &subnormal)[0], 0) << target;
    }
  }
}

// ---- norms

struct Vectors {
  int64_t rows;
  int heads;
  int dim;
  int64_t stride;
  std::vector<float> data;  // NaN between the rows.

  Vectors(int64_t row_count, int head_count, int dimension, int64_t gap, uint64_t seed, float size = 1)
      : rows(row_count),
        heads(head_count),
        dim(dimension),
        stride(int64_t{head_count} * dimension + gap),
        data(row_count * stride, kNaN) {
    const std::vector<float> numbers = Numbers(row_count * head_count * dimension, seed, size);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(&numbers[row * heads * dim], int64_t{heads} * dim, &data[row * stride]);
    }
  }
  std::string ToString() const {
    return absl::StrCat("{rows=", rows, " heads=", heads, " dim=", dim, " stride=", stride, "}");
  }
};

TEST_P(LayerKernelsContract, NormsMatchTheirDefinition) {
  const auto kernels = Make();
  const auto judge = MakeReferenceLayerKernels();
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    std::mt19937_64 random(seed);
    const auto pick = [&](auto... options) {
      const std::common_type_t<decltype(options)...> all[] = {options...};
      return all[random() % sizeof...(options)];
    };
    const Vectors x(pick(1, 2, 7, 40), pick(1, 1, 3), pick(1, 5, 16, 17, 64, 255, 1000, 1024, 1025, 4099),
                    pick(0, 8), seed, pick(1.0F, 1e-3F, 1e4F));
    NormArgs args;
    args.kind = pick(NormKind::kRms, NormKind::kLayer);
    args.rows = x.rows;
    args.heads = x.heads;
    args.dim = x.dim;
    args.x = x.data.data();
    args.x_stride = x.stride;
    const std::vector<float> weight = Numbers(x.dim, seed + 1);
    const std::vector<float> bias = Numbers(x.dim, seed + 2);
    args.weight = weight.data();
    args.weight_offset = pick(0.0F, 1.0F);
    args.bias = args.kind == NormKind::kLayer && pick(true, false) ? bias.data() : nullptr;
    args.epsilon = pick(1e-5F, 1e-6F);
    SCOPED_TRACE(absl::StrCat("seed ", seed, " kind ", static_cast<int>(args.kind), " ", x.ToString()));

    std::vector<float> y(x.data.size(), 5);
    std::vector<float> wanted(x.data.size(), 5);
    args.y_stride = x.stride;
    args.y = wanted.data();
    judge->Normalise(args);
    args.y = y.data();
    kernels->Normalise(args);
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], wanted[i],
                  2e-6 * (1 + std::abs(wanted[i])) * (1 + std::abs(weight[i % x.stride % x.dim])))
          << i;
    }

    // In place.
    Vectors same = x;
    args.x = args.y = same.data.data();
    kernels->Normalise(args);
    for (int64_t row = 0; row < x.rows; ++row) {
      ASSERT_TRUE(SameBits(&same.data[row * x.stride], &y[row * x.stride], int64_t{x.heads} * x.dim));
      for (int64_t i = int64_t{x.heads} * x.dim; i < x.stride; ++i) {
        ASSERT_TRUE(std::isnan(same.data[row * x.stride + i]));
      }
    }
  }
}

TEST_P(LayerKernelsContract, ANormOfEqualNumbersIsFinite) {
  const auto kernels = Make();
  const std::vector<float> x(64, 3.0F);
  const std::vector<float> zeros(64);
  const std::vector<float> ones(64, 1.0F);
  std::vector<float> y(64, kNaN);
  NormArgs args;
  args.kind = NormKind::kLayer;
  args.rows = 1;
  args.dim = 64;
  args.x = x.data();
  args.y = y.data();
  args.weight = ones.data();
  args.bias = ones.data();
  kernels->Normalise(args);
  EXPECT_EQ(y, ones);
  args.kind = NormKind::kRms;
  args.bias = nullptr;
  args.x = zeros.data();
  kernels->Normalise(args);
  EXPECT_EQ(y, zeros);
}

// ---- rotary positions

TEST(Rope, AnglesAreExactAtPositionTenMillion) {
  std::vector<double> frequencies;
  frequencies.reserve(32);
  for (int i = 0; i < 32; ++i) frequencies.push_back(std::pow(10000.0, -2.0 * i / 64));
  const int64_t positions[] = {10'000'000, (int64_t{1} << 30) - 1};
  std::vector<float> cosines(64);
  std::vector<float> sines(64);
  RopeAngles(frequencies, positions, cosines.data(), sines.data());
  for (int p = 0; p < 2; ++p) {
    for (int i = 0; i < 32; ++i) {
      const long double angle = static_cast<long double>(positions[p]) * powl(10000.0L, -2.0L * i / 64.0L);
      EXPECT_NEAR(cosines[p * 32 + i], static_cast<double>(cosl(angle)), 5e-7) << positions[p] << " " << i;
      EXPECT_NEAR(sines[p * 32 + i], static_cast<double>(sinl(angle)), 5e-7) << positions[p] << " " << i;
    }
  }
}

TEST_P(LayerKernelsContract, RotationsMatchTheirDefinition) {
  const auto kernels = Make();
  const auto judge = MakeReferenceLayerKernels();
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    std::mt19937_64 random(seed);
    const auto pick = [&](auto... options) {
      const std::common_type_t<decltype(options)...> all[] = {options...};
      return all[random() % sizeof...(options)];
    };
    const Vectors x(pick(1, 2, 7, 300), pick(1, 3, 8), pick(2, 10, 16, 64, 80, 256), pick(0, 7), seed);
    const int rotary_dim = std::min(x.dim, pick(0, 2, 16, 20, 64, 256));
    SCOPED_TRACE(absl::StrCat("seed ", seed, " rotary_dim ", rotary_dim, " ", x.ToString()));
    std::vector<int64_t> positions(x.rows);
    for (int64_t& p : positions) p = static_cast<int64_t>(random() % 1'000'000);
    std::vector<double> frequencies;
    frequencies.reserve(rotary_dim / 2);
    for (int i = 0; i < rotary_dim / 2; ++i) frequencies.push_back(std::pow(500.0, -2.0 * i / rotary_dim));
    std::vector<float> cosines(x.rows * frequencies.size());
    std::vector<float> sines(cosines.size());
    RopeAngles(frequencies, positions, cosines.data(), sines.data());

    std::vector<float> y(x.data.size(), 5);
    std::vector<float> wanted(x.data.size(), 5);
    RopeArgs args{x.rows,       x.heads,       x.dim,    rotary_dim,    cosines.data(),
                  sines.data(), x.data.data(), x.stride, wanted.data(), x.stride};
    judge->Rotate(args);
    args.y = y.data();
    kernels->Rotate(args);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], wanted[i], 1e-6) << i;
    Vectors same = x;
    args.x = args.y = same.data.data();
    kernels->Rotate(args);
    for (int64_t row = 0; row < x.rows; ++row) {
      ASSERT_TRUE(SameBits(&same.data[row * x.stride], &y[row * x.stride], int64_t{x.heads} * x.dim));
    }
  }
}

// ---- activations

TEST_P(LayerKernelsContract, ActivationsMatchTheirDefinition) {
  const auto kernels = Make();
  const auto judge = MakeReferenceLayerKernels();
  for (const Activation kind : {Activation::kSilu, Activation::kGeluErf, Activation::kGeluTanh}) {
    for (const int dim : {1, 15, 16, 100, 1031}) {
      for (const bool gated : {false, true}) {
        SCOPED_TRACE(absl::StrCat("kind ", static_cast<int>(kind), " dim ", dim, " gated ", gated));
        const int rows = 23;
        const int64_t stride = 2 * dim + 3;
        std::vector<float> x = Numbers(rows * stride, dim, 4);
        const float extremes[] = {0, -0.0F, 88, -88, 1e-30F, 1e30F, -1e30F, 12, -12};
        for (size_t i = 0; i < std::size(extremes); ++i) x[i * stride] = extremes[i];
        std::vector<float> y(rows * dim, kNaN);
        std::vector<float> wanted(rows * dim, kNaN);
        ActivationArgs args{kind,         rows, dim, x.data(), stride, gated ? x.data() + dim : nullptr,
                            wanted.data()};
        judge->Activate(args);
        args.y = y.data();
        kernels->Activate(args);
        for (int64_t i = 0; i < rows * dim; ++i) {
          const float in = x[i / dim * stride + i % dim];
          const float gate = gated ? x[i / dim * stride + dim + i % dim] : 1;
          ASSERT_NEAR(y[i], wanted[i], 1e-6 * std::abs(in * gate)) << in << " * " << gate;
        }
      }
    }
  }
}

TEST_P(LayerKernelsContract, SoftcapsMatchTheirDefinition) {
  const auto kernels = Make();
  const auto judge = MakeReferenceLayerKernels();
  for (const int count : {0, 1, 17, 4000}) {
    std::vector<float> x = Numbers(count, count, 50);
    std::vector<float> wanted = x;
    judge->Softcap({count, wanted.data(), 30});
    kernels->Softcap({count, x.data(), 30});
    for (int i = 0; i < count; ++i) ASSERT_NEAR(x[i], wanted[i], 3e-5);
  }
}

// ---- sums, and what is not finite

TEST_P(LayerKernelsContract, SumsAreRoundedOnce) {
  const auto kernels = Make();
  for (const int count : {1, 255, 256, 4000}) {
    const std::vector<float> from = Numbers(count, count, 3);
    std::vector<float> to = Numbers(count, count + 1);
    std::vector<float> wanted = to;
    for (int i = 0; i < count; ++i) wanted[i] += from[i];
    kernels->Add({count, from.data(), to.data()});
    EXPECT_EQ(to, wanted);
  }
}

TEST_P(LayerKernelsContract, WhatIsNotFiniteIsFoundWhereverItIs) {
  const auto kernels = Make();
  for (const int count : {1, 300, 2048, 5000}) {
    std::vector<float> x = Numbers(count, count);
    x[0] = std::numeric_limits<float>::max();
    float found = 7;
    kernels->FlagNonFinite({count, x.data(), &found});
    EXPECT_EQ(found, 0);
    for (const int at : {0, count / 2, count - 1}) {
      for (const float bad : {kNaN, std::numeric_limits<float>::infinity(), -HUGE_VALF}) {
        const float good = std::exchange(x[at], bad);
        kernels->FlagNonFinite({count, x.data(), &found});
        EXPECT_EQ(found, 1) << at;
        x[at] = good;
      }
    }
    kernels->FlagNonFinite({count, x.data(), &found});
    EXPECT_EQ(found, 0);
  }
}

// ---- bits

// Everything one after another, as one hashable array: for targets that must agree.
std::vector<float> Everything(LayerKernels& kernels, uint64_t seed) {
  constexpr int64_t kRows = 40;
  std::vector<float> bits;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const Product p{seed, dtype, {70, 33}, 301, kRows, true};
    const std::vector<char> weights = p.Weights();
    const std::vector<float> x = p.X();
    const std::vector<float> bias = p.Bias();
    const auto packed = Pack(kernels, p, weights);
    const auto y = Multiply(kernels, *packed, x.data(), kRows, bias.data());
    bits.insert(bits.end(), y.begin(), y.end());
  }
  const Vectors x(kRows, 3, 1300, 5, seed, 3);
  const std::vector<float> weight = Numbers(1300, seed + 1);
  std::vector<float> y(kRows * x.stride, 0);
  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    NormArgs args;
    args.kind = kind;
    args.rows = kRows;
    args.heads = x.heads;
    args.dim = x.dim;
    args.x = x.data.data();
    args.x_stride = args.y_stride = x.stride;
    args.y = y.data();
    args.weight = args.bias = weight.data();
    kernels.Normalise(args);
    bits.insert(bits.end(), y.begin(), y.end());
  }
  const std::vector<float> angles = Numbers(kRows * 50, seed + 2);
  kernels.Rotate(
      {kRows, 3, 1300, 100, angles.data(), angles.data(), x.data.data(), x.stride, y.data(), x.stride});
  bits.insert(bits.end(), y.begin(), y.end());
  for (const Activation kind : {Activation::kSilu, Activation::kGeluErf, Activation::kGeluTanh}) {
    std::vector<float> z(kRows * 1300);
    kernels.Activate({kind, kRows, 1300, x.data.data(), x.stride, x.data.data() + 1300, z.data()});
    kernels.Softcap({kRows * 1300, z.data(), 2});
    bits.insert(bits.end(), z.begin(), z.end());
  }
  return bits;
}

TEST(CpuLayerKernels, TargetsThatFuseMultiplyAndAddAgreeBitForBit) {
  for (const bool fma : {true, false}) {
    std::map<Activations, std::vector<float>> first;
    for (const std::string& target : CpuTargets()) {
      if (CpuTargetHasFma(target) != fma) continue;
      for (const Activations activations : {Activations::kF32, Activations::kBf16}) {
        std::vector<float>& wanted = first[activations];
        const std::vector<float> bits = Everything(*MakeCpuLayerKernelsForTest(1, target, activations), 3);
        if (wanted.empty()) wanted = bits;
        ASSERT_EQ(wanted.size(), bits.size());
        EXPECT_TRUE(SameBits(wanted.data(), bits.data(), bits.size())) << target;
      }
    }
  }
}

// ---- GPUs

// The GPU kernels that this machine runs.
std::vector<std::unique_ptr<LayerKernels>> CudaKernels(Activations activations) {
  std::vector<std::unique_ptr<LayerKernels>> all;
  if (cuda::EmulatedDeviceRuns()) all.push_back(EmulatedCuda(activations));
  if (CudaMissing().ok()) all.push_back(*OpenCuda(activations));
  return all;
}

// The promise that cuBLASLt is asked for: whatever block a row is in, wherever, and whoever is beside it.
TEST(CudaLayerKernels, AProductsRowIsTheSameAtEveryPlaceAndBesideEveryRow) {
  for (const Activations activations : {Activations::kF32, Activations::kBf16}) {
    for (std::unique_ptr<LayerKernels>& made : CudaKernels(activations)) {
      const bool is_gpu = made->name().find("emulated") == std::string::npos;
      const auto kernels = OnHost(std::move(made));
      for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
        // On a GPU as large as models' are: other algorithms serve those.
        const Product p{11, dtype, {is_gpu ? 9000 : 20}, is_gpu ? 4608 : 40, 300, true};
        SCOPED_TRACE(absl::StrCat(kernels->name(), " ", p.ToString()));
        const std::vector<char> weights = p.Weights();
        const std::vector<float> bias = p.Bias();
        const auto packed = Pack(*kernels, p, weights);
        const std::vector<float> row = Numbers(p.inputs, 12);
        const auto alone = Multiply(*kernels, *packed, row.data(), 1, bias.data());
        for (const int64_t place : {0, 1, 5, 31, 32, 41, 42, 63, 64, 100, 127, 128, 200, 299}) {
          for (const float size : {1.0F, 1e4F}) {
            std::vector<float> x = Numbers(p.rows * p.inputs, place, size);
            std::copy(row.begin(), row.end(), &x[place * p.inputs]);
            const int64_t rows = std::max<int64_t>(place + 1, size == 1 ? p.rows : 0);
            const auto y = Multiply(*kernels, *packed, x.data(), rows, bias.data());
            ASSERT_TRUE(SameBits(alone.data(), &y[place * packed->outputs()], packed->outputs()))
                << "at " << place << " of " << rows << " rows of size " << size;
          }
        }
      }
    }
  }
}

class FakeCublasLtTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  }
  void TearDown() override { cuda::TheFakeCublasLt().Reset(); }
  static absl::Status PackSome(LayerKernels& kernels, DType dtype = DType::kBf16) {
    const Product p{1, dtype, {70}, 50, 1, false};
    const std::vector<char> weights = p.Weights();
    return kernels.Pack({{weights.data(), dtype, 70, 50}}).status();
  }
};

TEST_F(FakeCublasLtTest, AnAlgorithmThatLooksAtARowsPlaceIsRefused) {
  const auto kernels = EmulatedCuda();
  cuda::TheFakeCublasLt().depends_on_place = true;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const absl::Status status = PackSome(*kernels, dtype);
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("wherever it stands"));
  }
  cuda::TheFakeCublasLt().Reset();
  EXPECT_TRUE(PackSome(*kernels).ok());
}

TEST_F(FakeCublasLtTest, AShapeWithoutAnAlgorithmIsAnError) {
  const auto kernels = EmulatedCuda();
  cuda::TheFakeCublasLt().has_none = true;
  EXPECT_EQ(PackSome(*kernels).code(), absl::StatusCode::kInternal);
}

TEST_F(FakeCublasLtTest, AProductThatFailsEndsTheDevice) {
  std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(kEmulatedBytes);
  const auto kernels = *MakeCudaLayerKernelsWith(device, cuda::FakeCublasLtApi(), Activations::kF32);
  cuda::TheFakeCublasLt().result = 13;
  EXPECT_EQ(PackSome(*kernels).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(device->health().code(), absl::StatusCode::kUnavailable);
  cuda::TheFakeCublasLt().Reset();
  EXPECT_EQ(kernels->Wait().code(), absl::StatusCode::kUnavailable);
}

// One product for each block of rows, however few they are.
TEST_F(FakeCublasLtTest, RowsGoInBlocksOfOneSize) {
  const auto kernels = OnHost(EmulatedCuda());
  const auto rounding = OnHost(EmulatedCuda(Activations::kBf16));
  const auto products = [](LayerKernels& by, DType dtype, int64_t rows) {
    const Product p{1, dtype, {70}, 50, rows, false};
    const auto packed = Pack(by, p, p.Weights());
    cuda::TheFakeCublasLt().products = 0;
    Multiply(by, *packed, p.X().data(), rows, nullptr);
    return cuda::TheFakeCublasLt().products.load();
  };
  EXPECT_EQ(products(*kernels, DType::kBf16, 1), 1);
  EXPECT_EQ(products(*kernels, DType::kBf16, 42), 1);
  EXPECT_EQ(products(*kernels, DType::kBf16, 43), 2);
  EXPECT_EQ(products(*kernels, DType::kF16, 43), 2);
  EXPECT_EQ(products(*kernels, DType::kF32, 33), 2);
  EXPECT_EQ(products(*rounding, DType::kBf16, 128), 1);
  EXPECT_EQ(products(*rounding, DType::kBf16, 129), 2);
}

TEST_F(FakeCublasLtTest, WithoutMemoryNothingIsPacked) {
  const auto kernels =
      *MakeCudaLayerKernelsWith(cuda::MakeEmulatedDevice(60'000), cuda::FakeCublasLtApi(), Activations::kF32);
  EXPECT_EQ(PackSome(*kernels).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(kernels->Allocate(1 << 20, true).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(kernels->Wait().ok());
}

TEST_F(FakeCublasLtTest, ItsFingerprintIsItsOwn) {
  const uint64_t exact = LayerFingerprint(*EmulatedCuda()).value();
  EXPECT_EQ(LayerFingerprint(*EmulatedCuda()).value(), exact);
  EXPECT_NE(LayerFingerprint(*EmulatedCuda(Activations::kBf16)).value(), exact);
  EXPECT_NE(LayerFingerprint(*MakeCpuLayerKernels(1)).value(), exact);
  EXPECT_EQ(EmulatedCuda()->library(), "cuBLASLt 999900 on cuda:emulated");
}

// A machine has it or not; where it has not, this is all that a user is told.
TEST(CublasLt, IsLoadedOrSaysHowToInstallIt) {
  const auto api = cuda::LoadCublasLt();
  if (api.ok()) {
    EXPECT_GE((*api)->get_version(), 12'0000U);
  } else {
    EXPECT_EQ(api.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(api.status().message()), ::testing::HasSubstr("install"));
  }
}

// f32 activations lose nothing that f32 has, whatever their size: three terms are the number.
TEST(CudaLayerKernels, ThreeTermsAreTheNumber) {
  for (std::unique_ptr<LayerKernels>& made : CudaKernels(Activations::kF32)) {
    const auto kernels = OnHost(std::move(made));
    const float one = 1;
    std::vector<char> weight(2);
    StoreElement(weight.data(), DType::kBf16, 0, one);
    const auto packed = *kernels->Pack({{weight.data(), DType::kBf16, 1, 1}});
    std::vector<float> x = Numbers(500, 1);
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(x[i], static_cast<int>(i % 200) - 100);
    x.push_back(std::numeric_limits<float>::max());
    x.push_back(-std::numeric_limits<float>::max());
    x.push_back(0);
    const auto y = Multiply(*kernels, *packed, x.data(), static_cast<int64_t>(x.size()), nullptr);
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(x[i], y[i]) << i;
  }
}

// Nothing of an infinity may be left that looks like a number.
TEST_P(LayerKernelsContract, ProductsOfWhatIsNotFiniteAreNotFinite) {
  const auto kernels = Make();
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const Product p{3, dtype, {40}, 70, 3, true};
    const std::vector<float> bias = p.Bias();
    const auto packed = Pack(*kernels, p, p.Weights());
    for (const float bad : {kNaN, HUGE_VALF, -HUGE_VALF}) {
      std::vector<float> x = p.X();
      const auto good = Multiply(*kernels, *packed, x.data(), p.rows, bias.data());
      x[1 * p.inputs + 33] = bad;
      const auto y = Multiply(*kernels, *packed, x.data(), p.rows, bias.data());
      for (int64_t n = 0; n < 40; ++n) ASSERT_FALSE(std::isfinite(y[40 + n])) << n;
      EXPECT_TRUE(SameBits(y.data(), good.data(), 40) && SameBits(&y[80], &good[80], 40));
    }
  }
}

TEST_P(LayerKernelsContract, ThreadsDoNotChangeABit) {
  const auto a = Everything(*Make(1), 5);
  const auto b = Everything(*Make(3), 5);
  EXPECT_TRUE(SameBits(a.data(), b.data(), a.size()));
}

}  // namespace
}  // namespace eduba
