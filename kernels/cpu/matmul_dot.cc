// Products with rounded activations by dot products of pairs, to the bits of kernels/cpu/matmul.cc.

#include <algorithm>
#include <utility>

#include "kernels/cpu/flushed_subnormals.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pair_dot.h"

#if defined(__x86_64__)
namespace eduba {
namespace {

constexpr int kLanes = kPairDotLanes;
constexpr int kVectors = kPanelOutputs / kLanes;
// The same as in matmul.cc.
constexpr int kPrefetchBytes = 4096;

// Computes what Tile of matmul.cc computes, with dot products of bf16 pairs.
template <int kRows>
EDUBA_PAIR_DOT void Tile(const Bf16Pair* __restrict weights, int pairs, bool prefetch,
                         const Bf16Pair* __restrict x, int64_t x_row, bool begin, float* __restrict y,
                         int64_t y_row) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int i = 0; i < pairs; ++i, weights += kPanelOutputs) {
    if (prefetch) {
      for (int v = 0; v < kVectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(weights + v * kLanes) + kPrefetchBytes, _MM_HINT_T0);
      }
    }
    __m512i w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(weights + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = _mm512_set1_epi32(static_cast<int>(x[r * x_row + i]));
      for (int v = 0; v < kVectors; ++v) sum[r][v] = PairDot(sum[r][v], value, w[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + r * y_row + v * kLanes;
      _mm512_storeu_ps(to, begin ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
    }
  }
}

using TileFunction = void (*)(const Bf16Pair*, int, bool, const Bf16Pair*, int64_t, bool, float*, int64_t);
template <int... kCounts>
TileFunction TileFor(int64_t rows, std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr TileFunction kTable[] = {Tile<kCounts + 1>...};
  return kTable[rows - 1];
}

void MultiplyPanel(const PanelCall& call) {
  const FlushedSubnormals flushed;  // For what is added to the dot products.
  const int64_t tiles = (call.rows + kPairDotRowsMax - 1) / kPairDotRowsMax;
  const auto* weights = static_cast<const Bf16Pair*>(call.panel);
  for (int64_t at = 0, block = 0; at < call.inputs; at += kMatmulBlock, ++block) {
    const int pairs = static_cast<int>(std::min<int64_t>(kMatmulBlock, call.inputs - at) + 1) / 2;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = call.rows * t / tiles;
      const int64_t count = call.rows * (t + 1) / tiles - row;
      TileFor(count, std::make_integer_sequence<int, kPairDotRowsMax>())(
          weights + at / 2 * kPanelOutputs, pairs, t == 0,
          call.x_pairs + row * call.x_row + block * call.x_block, call.x_row, at == 0,
          call.y + row * call.y_row, call.y_row);
    }
  }
  for (int64_t r = 0; r < call.rows; ++r) {
    float* to = call.y + r * call.y_row;
    if (call.inputs == 0) std::fill_n(to, kPanelOutputs, 0.0F);
    for (int n = 0; call.bias != nullptr && n < kPanelOutputs; ++n) to[n] += call.bias[n];
  }
}

}  // namespace

MultiplyPanelFunction MultiplyPanelByDotProducts() { return HasPairDot() ? MultiplyPanel : nullptr; }

}  // namespace eduba

#else

namespace eduba {

MultiplyPanelFunction MultiplyPanelByDotProducts() { return nullptr; }

}  // namespace eduba

#endif
