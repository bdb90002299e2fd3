#include "kernels/layer_fingerprint.h"

#include <xxhash.h>

#include <algorithm>
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

// Floats where `kernels` work.
absl::StatusOr<LayerFloats> Give(LayerKernels& kernels, const std::vector<float>& floats) {
  LayerFloats given(&kernels, LayerFloats::Use::kShared);
  const auto count = static_cast<int64_t>(floats.size());
  EDUBA_RETURN_IF_ERROR(given.Reserve(count));
  std::copy(floats.begin(), floats.end(), given.host());
  given.Send(0, count);
  return given;
}

// What run(y) writes to y [rows, width].
template <class Run>
absl::StatusOr<Results> Take(LayerKernels& kernels, int64_t rows, int64_t width, const Run& run) {
  LayerFloats y(&kernels, LayerFloats::Use::kShared);
  EDUBA_RETURN_IF_ERROR(y.Reserve(rows * width));
  run(y.data());
  y.Fetch(0, rows * width);
  EDUBA_RETURN_IF_ERROR(kernels.Wait());
  return Results{{y.host(), y.host() + rows * width}, width};
}

// Compares each row alone with the same row in a batch, and appends the batch's bits to `bits`. `run(first,
// rows)` computes rows [first, first + rows).
template <class Run>
absl::Status AddRows(const std::string& what, const Run& run, std::vector<float>& bits) {
  EDUBA_ASSIGN_OR_RETURN(const Results batch, run(0, kRows));
  for (const int64_t row : {int64_t{0}, int64_t{11}, kRows - 1}) {
    EDUBA_ASSIGN_OR_RETURN(const Results alone, run(row, 1));
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
  EDUBA_ASSIGN_OR_RETURN(const LayerFloats x, Give(kernels, take(kRows * kInputs)));
  EDUBA_ASSIGN_OR_RETURN(const LayerFloats bias, Give(kernels, take(kInputs)));

  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    std::vector<char> weights(kOutputs * kInputs * DTypeBytes(dtype));
    for (int64_t i = 0; i < kOutputs * kInputs; ++i) StoreElement(weights.data(), dtype, i, numbers.Next());
    EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<PackedMatrix> packed,
                           kernels.Pack({{weights.data(), dtype, kOutputs, kInputs}}));
    const auto multiply = [&](int64_t first, int64_t rows) {
      return Take(kernels, rows, kOutputs, [&](float* y) {
        kernels.Multiply({packed.get(), rows, x.data() + first * kInputs, bias.data(), y});
      });
    };
    EDUBA_RETURN_IF_ERROR(
        AddRows(absl::StrCat(kernels.name(), " ", DTypeName(dtype), " product"), multiply, bits));
  }

  for (const NormKind kind : {NormKind::kRms, NormKind::kLayer}) {
    const auto normalise = [&](int64_t first, int64_t rows) {
      return Take(kernels, rows, kInputs, [&](float* y) {
        NormArgs args;
        args.kind = kind;
        args.rows = rows;
        args.dim = kInputs;
        args.x = x.data() + first * kInputs;
        args.x_stride = args.y_stride = kInputs;
        args.y = y;
        args.weight = args.bias = bias.data();
        kernels.Normalise(args);
      });
    };
    EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " norm"), normalise, bits));
  }

  // The C library's cosines are part of the bits.
  constexpr int kRotary = 100;
  std::vector<double> frequencies;
  frequencies.reserve(kRotary / 2);
  double frequency = 1;
  for (int i = 0; i < kRotary / 2; ++i) frequencies.push_back(frequency *= 0.75);
  const auto rotate = [&](int64_t first, int64_t rows) -> absl::StatusOr<Results> {
    std::vector<int64_t> positions;
    positions.reserve(rows);
    for (int64_t row = first; row < first + rows; ++row) positions.push_back(row * row * row * 12'345);
    std::vector<float> cosines(rows * frequencies.size());
    std::vector<float> sines(cosines.size());
    RopeAngles(frequencies, positions, cosines.data(), sines.data());
    EDUBA_ASSIGN_OR_RETURN(const LayerFloats given_cosines, Give(kernels, cosines));
    EDUBA_ASSIGN_OR_RETURN(const LayerFloats given_sines, Give(kernels, sines));
    return Take(kernels, rows, kInputs, [&](float* y) {
      kernels.Rotate({rows, 1, kInputs, kRotary, given_cosines.data(), given_sines.data(),
                      x.data() + first * kInputs, kInputs, y, kInputs});
    });
  };
  EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " rotation"), rotate, bits));

  for (const Activation kind : {Activation::kSilu, Activation::kGeluErf, Activation::kGeluTanh}) {
    const auto activate = [&](int64_t first, int64_t rows) {
      return Take(kernels, rows, kInputs, [&](float* y) {
        kernels.Activate({kind, rows, kInputs, x.data() + first * kInputs, kInputs, nullptr, y});
        kernels.Softcap({rows * kInputs, y, 0.5F});
      });
    };
    EDUBA_RETURN_IF_ERROR(AddRows(absl::StrCat(kernels.name(), " activation"), activate, bits));
  }
  const XXH64_hash_t hash = XXH3_64bits(bits.data(), bits.size() * sizeof(float));
  const std::string library = kernels.library();
  return library.empty() ? hash : XXH3_64bits_withSeed(library.data(), library.size(), hash);
}

}  // namespace eduba
