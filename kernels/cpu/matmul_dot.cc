// Products with rounded activations by VDPBF16PS. Per output and pair of inputs it computes, with subnormal
// numbers as zeros, fma(x[2i], w[2i], fma(x[2i + 1], w[2i + 1], sum)): what kernels/cpu/matmul.cc does by two
// fused multiply-adds, in a fourth of the instructions. (Intel, Architecture Instruction Set Extensions,
// VDPBF16PS; AMD's Zen 4 gives the same bits, as layer_kernels_test.cc sees.)

#include <algorithm>
#include <utility>

#include "kernels/cpu/flushed_subnormals.h"
#include "kernels/cpu/matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define EDUBA_DOT __attribute__((target("avx512f,avx512bf16")))

namespace eduba {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = kPanelOutputs / kLanes;
constexpr int kMaxTile = 12;  // 24 sums of the 32 registers.
// As in matmul.cc.
constexpr int kPrefetchBytes = 4096;

EDUBA_DOT inline __m512 Dot(__m512 sum, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}

// As Tile of matmul.cc.
template <int kRows>
EDUBA_DOT void Tile(const Bf16Pair* __restrict weights, int pairs, bool prefetch,
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
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot(sum[r][v], value, w[v]);
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
  const int64_t tiles = (call.rows + kMaxTile - 1) / kMaxTile;
  const auto* weights = static_cast<const Bf16Pair*>(call.panel);
  for (int64_t at = 0, block = 0; at < call.inputs; at += kMatmulBlock, ++block) {
    const int pairs = static_cast<int>(std::min<int64_t>(kMatmulBlock, call.inputs - at) + 1) / 2;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = call.rows * t / tiles;
      const int64_t count = call.rows * (t + 1) / tiles - row;
      TileFor(count, std::make_integer_sequence<int, kMaxTile>())(
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

MultiplyPanelFunction MultiplyPanelByDotProducts() {
  return __builtin_cpu_supports("avx512bf16") ? MultiplyPanel : nullptr;
}

}  // namespace eduba

#else

namespace eduba {

MultiplyPanelFunction MultiplyPanelByDotProducts() { return nullptr; }

}  // namespace eduba

#endif
