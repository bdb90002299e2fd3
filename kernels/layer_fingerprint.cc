#include "kernels/layer_fingerprint.h"

#include <xxhash.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "kernels/fixed_numbers.h"

namespace eduba {
namespace {

constexpr int64_t kRows = 29;  // More than a tile of rows and no multiple of one.
constexpr int64_t kInputs = 301;
constexpr int64_t kOutputs = 103;

// Bits of some rows, row by row.
struct Results {
  std::vector<float> values;
  int64_t width = 0;
};

// Compares each row alone with the same row in a batch, and appends the batch's bits to `bits`. `run(first,
// rows)` computes rows [first, first + rows).
template <class Run>
absl::Status AddRows(const std::string& what, const Run& run, std::vector<float>& bits) {
  const Results batch = run(0, kRows);
  for (const int64_t row : {int64_t{0}, int64_t{11}, kRows - 1}) {
    const Results alone = run(row, 1);
    if (std::memcmp(alone.values.data(), &batch.values[row * batch.width], batch.width * sizeof(float)) !=
        0) {
      return absl::InternalError(absl::StrCat(what, ": row ", row,
                                              " of a fixed problem has other bits alone than in a batch of ",
                                              kRows, "; this build must not serve on this machine"));
    }
  }
  bits.insert(bits.end(), batch.values.begin(), batch.values.end());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint64_t> LayerFingerprint(LayerKernels& kernels) {
  FixedNumbers numbers;
  const auto take = [&](int64_t count) {
    std::vector<float> taken(count);
    for (float& x : taken) x = numbers.Next();
    return taken;
  };
  std::vector<float> bits;
  const std::vector<float> x = take(kRows * kInputs);
  const std::vector<float> bias = take(kInputs);

  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    std::vector<char> weights(kOutputs * kInputs * DTypeBytes(dtype));
    for (int64_t i = 0; i < kOutputs * kInputs; ++i) StoreElement(weights.data(), dtype, i, numbers.Next());
    EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<PackedMatrix> packed,
                           kernels.Pack({{weights.data(), dtype, kOutputs, kInputs}}));
    const auto multiply = [&](int64_t first, int64_t rows) {
      Results y{std::vector<float>(rows * kOutputs), kOutputs};
      kernels.Multiply({packed.get(), rows, &x[first * kInputs], bias.data(), y.values.data()});
      return y;
    };
    EDUBA_RETURN_IF_ERROR(
        AddRows(absl::StrCat(kernels.name(), " ", DTypeName(dtype), " product"), multiply, bits));
  }

  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    const auto normalise = [&](int64_t first, int64_t rows) {
      Results y{std::vector<float>(rows * kInputs), kInputs};
      NormArgs args;
      args.kind = kind;
      args.rows = rows;
      args.dim = kInputs;
      args.x = &x[first * kInputs];
      args.x_stride = args.y_stride = kInputs;
      args.y = y.values.data();
      args.weight = args.bias = bias.data();
      kernels.Normalise(args);
      return y;
    };
    EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " norm"), normalise, bits));
  }

  // The C library's cosines are part of the bits.
  constexpr int kRotary = 100;
  std::vector<double> frequencies;
  frequencies.reserve(kRotary / 2);
  double frequency = 1;
  for (int i = 0; i < kRotary / 2; ++i) frequencies.push_back(frequency *= 0.75);
  const auto rotate = [&](int64_t first, int64_t rows) {
    Results y{std::vector<float>(rows * kInputs), kInputs};
    std::vector<int64_t> positions;
    positions.reserve(rows);
    for (int64_t row = first; row < first + rows; ++row) positions.push_back(row * row * row * 12'345);
    std::vector<float> cosines(rows * frequencies.size());
    std::vector<float> sines(cosines.size());
    RopeAngles(frequencies, positions, cosines.data(), sines.data());
    kernels.Rotate({rows, 1, kInputs, kRotary, cosines.data(), sines.data(), &x[first * kInputs], kInputs,
                    y.values.data(), kInputs});
    return y;
  };
  EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " rotation"), rotate, bits));

  for (const Activation kind : {Activation::kSilu, Activation::kGeluErf, Activation::kGeluTanh}) {
    const auto activate = [&](int64_t first, int64_t rows) {
      Results y{std::vector<float>(rows * kInputs), kInputs};
      kernels.Activate({kind, rows, kInputs, &x[first * kInputs], kInputs, nullptr, y.values.data()});
      kernels.Softcap({rows * kInputs, y.values.data(), 0.5F});
      return y;
    };
    EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " activation"), activate, bits));
  }
  return XXH3_64bits(bits.data(), bits.size() * sizeof(float));
}

}  // namespace eduba
