#ifndef EDUBA_KERNELS_CPU_MATMUL_H_
#define EDUBA_KERNELS_CPU_MATMUL_H_

#include <cstdint>

#include "base/dtype.h"
#include "kernels/matmul.h"

namespace eduba {

// Packed weights: panels of kPanelOutputs outputs one after another (missing outputs are zeros), and in each
//   f32, f16   [inputs, kPanelOutputs]
//   bf16       [inputs / 2 rounded up, kPanelOutputs, 2]   so that one load and two cheap operations give the
//              weights of two inputs
// so a product reads a panel from its first byte to its last.
inline constexpr int kPanelOutputs = 32;
// Inputs of one sum (kernels/matmul.h).
inline constexpr int kMatmulBlock = 256;
// Floats between rows of activations that were copied for the kernel: not a power of two, or they would all
// fall on the same lines of the cache.
inline constexpr int kMatmulBlockPitch = kMatmulBlock + 16;

inline int64_t PanelBytes(DType dtype, int64_t inputs) {
  const int64_t padded = dtype == DType::kBf16 ? (inputs + 1) / 2 * 2 : inputs;
  return padded * kPanelOutputs * static_cast<int64_t>(DTypeBytes(dtype));
}

// Activations as the kernel takes them where they are rounded (kernels/matmul.h): two inputs a word, the
// first in the lower half.
using Bf16Pair = uint32_t;

// Some rows against one panel.
struct PanelCall {
  DType dtype = DType::kF32;
  const void* panel = nullptr;
  int64_t inputs = 0;
  int64_t rows = 0;
  // Row r of block b of the inputs begins at x + r * x_row + b * x_block; x is floats or, for bf16 panels,
  // pairs, whichever is there.
  const float* x = nullptr;
  const Bf16Pair* x_pairs = nullptr;
  int64_t x_row = 0;  // Floats or pairs, as x_block.
  int64_t x_block = 0;
  const float* bias = nullptr;  // [kPanelOutputs], or none
  float* y = nullptr;           // Row r's kPanelOutputs results at y + r * y_row.
  int64_t y_row = 0;
};

using MultiplyPanelFunction = void (*)(const PanelCall& call);
// For one of Highway's targets that this machine runs.
MultiplyPanelFunction MultiplyPanelFor(int64_t target);

// The same for calls with x_pairs, by AVX512_BF16's dot products, to the same bits; null where this machine
// has none.
MultiplyPanelFunction MultiplyPanelByDotProducts();

// Rounds count floats to pairs, of which the last is filled up with a zero.
using RoundToPairsFunction = void (*)(const float* from, int64_t count, Bf16Pair* to);
RoundToPairsFunction RoundToPairsFor(int64_t target);

// Writes panel `panel` of the matrix that `parts` make together.
void PackPanel(const MatrixView* parts, int count, int64_t panel, void* to);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_MATMUL_H_
