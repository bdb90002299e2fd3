#ifndef EDUBA_KERNELS_CPU_PAIR_DOT_H_
#define EDUBA_KERNELS_CPU_PAIR_DOT_H_

#if defined(__x86_64__)
#include <immintrin.h>

// AVX512_BF16's dot products of pairs, for the kernels that are written with them.
namespace eduba {

// For functions that call PairDot, and for them alone: only chips that HasPairDot run them.
#define EDUBA_PAIR_DOT __attribute__((target("avx512f,avx512bw,avx512bf16")))

inline constexpr int kPairDotLanes = 16;
// Rows of two vectors of sums that a tile may have: 24 of the 32 registers.
inline constexpr int kPairDotRowsMax = 12;

inline bool HasPairDot() {
  return __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0;
}

// VDPBF16PS. Per lane, of pairs of bf16 numbers, with subnormal numbers as zeros: fma(x[0], y[0], fma(x[1],
// y[1], sum)), which is what targets without it do by two fused multiply-adds, in a fourth of the
// instructions. (Intel, Architecture Instruction Set Extensions, VDPBF16PS; AMD's Zen 4 gives the same bits,
// as layer_kernels_test.cc and backend_test.cc see.)
EDUBA_PAIR_DOT inline __m512 PairDot(__m512 sum, __m512i x, __m512i y) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}

}  // namespace eduba
#endif

#endif  // EDUBA_KERNELS_CPU_PAIR_DOT_H_
