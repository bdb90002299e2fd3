#ifndef EDUBA_KERNELS_CUDA_ARITHMETIC_H_
#define EDUBA_KERNELS_CUDA_ARITHMETIC_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "base/dtype.h"

// The single operations of a page's arithmetic, the same on a GPU and on a host: operation for operation what
// kernels/cpu/page_kernels.cc does where it has fused multiply-add, so a GPU gives the bits of AVX2. On the
// device they are the intrinsics that round to nearest and that no compiler flag can fuse or approximate.
#ifdef __CUDACC__
#define EDUBA_DEVICE __device__ __forceinline__
#define EDUBA_UNROLL _Pragma("unroll")
#else
#define EDUBA_DEVICE inline
#define EDUBA_UNROLL
#endif

namespace eduba::cuda {

EDUBA_DEVICE float Add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
EDUBA_DEVICE float Sub(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}
EDUBA_DEVICE float Mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
EDUBA_DEVICE float Div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
// REQUIRES: no NaN.
EDUBA_DEVICE float Max(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
EDUBA_DEVICE float Min(float a, float b) {
#ifdef __CUDA_ARCH__
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}
// The smaller one; NaN where a is. REQUIRES: b is not.
EDUBA_DEVICE float MinOrNan(float a, float b) {
#ifdef __CUDA_ARCH__
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a > b ? b : a;
#endif
}
// a / b within 2 ulp on a GPU, for b of [1, 2].
EDUBA_DEVICE float DivNearly(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
EDUBA_DEVICE float Fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
EDUBA_DEVICE double Add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
EDUBA_DEVICE double Sub(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dsub_rn(a, b);
#else
  return a - b;
#endif
}
EDUBA_DEVICE double Mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
EDUBA_DEVICE double Div(double a, double b) {
#ifdef __CUDA_ARCH__
  return __ddiv_rn(a, b);
#else
  return a / b;
#endif
}
EDUBA_DEVICE double Fma(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
EDUBA_DEVICE double Sqrt(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}
EDUBA_DEVICE double Abs(double x) {
#ifdef __CUDA_ARCH__
  return fabs(x);
#else
  return std::abs(x);
#endif
}
// To the nearest integer, ties to even. REQUIRES: |x| < 2^63.
EDUBA_DEVICE int64_t RoundToInteger(double x) {
#ifdef __CUDA_ARCH__
  return __double2ll_rn(x);
#else
  return std::llrint(x);
#endif
}

inline constexpr float kFloatMax = 0x1.fffffep127F;
EDUBA_DEVICE float Infinity() { return std::bit_cast<float>(0x7f800000U); }
// False for infinities and NaN.
EDUBA_DEVICE bool IsFinite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000U) != 0x7f800000U; }

// exp(x) for x <= 1: 0 below -87, NaN for NaN. Within 1.1 ulp.
EDUBA_DEVICE float Exp(float x) {
  constexpr float kRound = 0x1.8p23F;
  const float shifted = Fma(x, 1.44269504F, kRound);
  const float n = Sub(shifted, kRound);
  float r = Fma(n, -0.693145751953125F, x);
  r = Fma(n, -1.428606765330187e-06F, r);
  float p = Fma(0.00129408902F, r, 0.00836335309F);
  p = Fma(p, r, 0.0416814387F);
  p = Fma(p, r, 0.166665763F);
  p = Fma(p, r, 0.499999553F);
  p = Fma(p, Mul(r, r), Add(r, 1.0F));
  // The low bits of `shifted` are n; a multiplication by 2^n keeps NaN.
  const uint32_t bits = (std::bit_cast<uint32_t>(shifted) + 127) << 23;
  return x < -87.0F ? 0.0F : Mul(p, std::bit_cast<float>(bits));
}

// 2^x within 2 ulp, by the chip's own unit on a GPU: bits of one kind of GPU. 0 where it is below 2^-126, NaN
// for NaN.
EDUBA_DEVICE float TwoTo(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126F ? 0 : y;
#endif
}

// softcap * tanh(scale * dot / softcap), the tanh within 2 ulp.
EDUBA_DEVICE float Capped(float dot, float scale, float softcap) {
  const float u = Div(Mul(dot, scale), softcap);
  const float size = std::bit_cast<float>(std::bit_cast<uint32_t>(u) & 0x7fffffffU);
  const float z = Mul(u, u);
  float p = Fma(0.00229274482F, z, -0.00834394526F);
  p = Fma(p, z, 0.0217689183F);
  p = Fma(p, z, -0.0539592579F);
  p = Fma(p, z, 0.133333042F);
  p = Fma(p, z, -0.333333343F);
  const float small = Fma(Mul(p, z), size, size);
  // 1 - 2 e / (1 + e) with e = exp(-2 |u|).
  const float e = Exp(Mul(size, -2.0F));
  const float large = Sub(1.0F, Div(Add(e, e), Add(1.0F, e)));
  const float tanh = size < 0.625F ? small : large;
  const uint32_t sign = std::bit_cast<uint32_t>(u) & 0x80000000U;
  return Mul(softcap, std::bit_cast<float>((std::bit_cast<uint32_t>(tanh) & 0x7fffffffU) | sign));
}

// Unsigned numbers that order as floats do; 0 is below them all. REQUIRES: no NaN.
EDUBA_DEVICE uint32_t OrderOf(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
inline float FloatOfOrder(uint32_t order) {
  if (order == 0) return -std::bit_cast<float>(0x7f800000U);
  return std::bit_cast<float>((order & 0x80000000U) != 0 ? order & 0x7fffffffU : ~order);
}

// kernels/merging_step.h's LogMagnitude, operation for operation.
EDUBA_DEVICE float LogMagnitude(float m, float o) {
  const int k = static_cast<int>(std::bit_cast<uint32_t>(o) >> 23 & 0xff) - 126;
  if (o == 0) return -std::bit_cast<float>(0x7f800000U);
  return Add(m, Mul(static_cast<float>(k), 0.693147181F));
}

// How elements are stored; kElement bytes each. Low and High: of a 32-bit word that holds two; Pack rounds
// two numbers into one, to nearest, ties to even.
struct F32 {
  static constexpr int kElement = 4;
  using Stored = uint32_t;
  static EDUBA_DEVICE float Value(uint32_t bits) { return std::bit_cast<float>(bits); }
};
struct Bf16 {
  static constexpr int kElement = 2;
  static constexpr bool kHasFloatRange = true;  // Its range is as wide as a float's.
  using Stored = uint16_t;
  static EDUBA_DEVICE float Low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
  static EDUBA_DEVICE float High(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000U); }
  static EDUBA_DEVICE float Value(uint16_t bits) { return Low(bits); }
  static EDUBA_DEVICE uint32_t Pack(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return Bf16FromF32(low) | static_cast<uint32_t>(Bf16FromF32(high)) << 16;
#endif
  }
};
struct F16 {
  static constexpr int kElement = 2;
  static constexpr bool kHasFloatRange = false;
  using Stored = uint16_t;
  static EDUBA_DEVICE float Value(uint16_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    return F32FromF16(bits);
#endif
  }
  static EDUBA_DEVICE float Low(uint32_t pair) { return Value(static_cast<uint16_t>(pair & 0xffffU)); }
  static EDUBA_DEVICE float High(uint32_t pair) { return Value(static_cast<uint16_t>(pair >> 16)); }
  static EDUBA_DEVICE uint32_t Pack(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return F16FromF32(low) | static_cast<uint32_t>(F16FromF32(high)) << 16;
#endif
  }
};

// 16 bytes, loaded at once.
struct alignas(16) Load16 {
  uint32_t word[4];
};
struct alignas(8) Load8 {
  uint32_t word[2];
};
// From memory that nobody writes while the kernel runs.
EDUBA_DEVICE Load16 LoadConstant16(const void* from) {
#ifdef __CUDA_ARCH__
  const uint4 x = __ldg(static_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
#else
  Load16 x;
  std::memcpy(&x, from, sizeof(x));
  return x;
#endif
}
EDUBA_DEVICE Load8 LoadConstant8(const void* from) {
#ifdef __CUDA_ARCH__
  const uint2 x = __ldg(static_cast<const uint2*>(from));
  return {{x.x, x.y}};
#else
  Load8 x;
  std::memcpy(&x, from, sizeof(x));
  return x;
#endif
}
EDUBA_DEVICE uint32_t LoadConstant4(const void* from) {
#ifdef __CUDA_ARCH__
  return __ldg(static_cast<const unsigned int*>(from));
#else
  uint32_t x;
  std::memcpy(&x, from, sizeof(x));
  return x;
#endif
}

// kCount neighbours from shared memory, in as few loads as there can be. REQUIRES: aligned to all of them, or
// to 16 bytes.
template <int kCount>
EDUBA_DEVICE void LoadShared(const float* from, float (&to)[kCount]) {
#ifdef __CUDA_ARCH__
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i);
      to[i] = x.x;
      to[i + 1] = x.y;
      to[i + 2] = x.z;
      to[i + 3] = x.w;
    }
  } else if constexpr (kCount == 2) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    to[0] = x.x;
    to[1] = x.y;
  } else {
    static_assert(kCount == 1);
    to[0] = *from;
  }
#else
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
#endif
}

// Two neighbours. REQUIRES: aligned to both.
EDUBA_DEVICE void StorePair(float* to, float x, float y) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<float2*>(to) = make_float2(x, y);
#else
  to[0] = x;
  to[1] = y;
#endif
}

// On global memory, from any block. Integer sums, maxima and minima: their order does not show.
EDUBA_DEVICE uint64_t AtomicAdd(uint64_t* at, uint64_t x) {
#ifdef __CUDA_ARCH__
  return atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));
#else
  const uint64_t before = *at;
  *at += x;
  return before;
#endif
}
EDUBA_DEVICE void AtomicMax(uint64_t* at, uint64_t x) {
#ifdef __CUDA_ARCH__
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));
#else
  if (*at < x) *at = x;
#endif
}
EDUBA_DEVICE void AtomicMax(uint32_t* at, uint32_t x) {
#ifdef __CUDA_ARCH__
  atomicMax(reinterpret_cast<unsigned int*>(at), static_cast<unsigned int>(x));
#else
  if (*at < x) *at = x;
#endif
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_ARITHMETIC_H_
