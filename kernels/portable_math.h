#ifndef EDUBA_KERNELS_PORTABLE_MATH_H_
#define EDUBA_KERNELS_PORTABLE_MATH_H_

#include <bit>
#include <cstdint>

namespace eduba {

// The largest size of a page's largest logit up to which weights come from differences that are rounded once
// (docs/numerics.md section 2). Rounding the largest itself then makes no weight of it beyond exp(2^-7).
inline constexpr float kFusedLogitMax = 65536;

// exp, log and tanh in double from additions, multiplications and divisions alone (build with
// -ffp-contract=off and -fmad=false), so that ranks with different C libraries, and their GPUs, get the same
// bits. No fused multiply-add: where the chip has none, it is a slow call.

// Within 1.25 ulp. Below -708 it is 0; x must not exceed 708; NaN stays NaN.
constexpr double PortableExp(double x) {
  if (x < -708) return 0;
  constexpr double kRound = 0x1.8p52;  // Adding it leaves the nearest integer in the last bits.
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 32 bits: n * kLn2High is exact.
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  const double n = (x * kLog2E + kRound) - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Taylor to r^13 / 13!: what is left out is below 1e-17.
  constexpr double kInverseFactorials[] = {1.0,
                                           1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800};
  double sum = 0;
  for (int i = 13; i >= 0; --i) sum = sum * r + kInverseFactorials[i];
  if (!(n >= -1022)) return sum;  // NaN
  return sum * std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// Within 1 ulp. REQUIRES: x is finite, positive and not subnormal.
//
// x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); with s = f / (2 + f), ln(1 + f) = 2 artanh(s) = f
// - f^2/2 + s (f^2/2 + R), where R = 2 s^2/3 + 2 s^4/5 + ...: the large terms carry no rounding of s. The
// arrangement is FreeBSD's e_log.c's (Sun Microsystems, fdlibm); the polynomial is artanh's own series.
constexpr double PortableLog(double x) {
  constexpr double kLn2High = 0x1.62e42fee00000p-1;  // 32 bits: k * kLn2High is exact.
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdU;
  const auto bits = std::bit_cast<uint64_t>(x);
  const int64_t k = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double f = std::bit_cast<double>(bits - (static_cast<uint64_t>(k) << 52)) - 1;
  const double s = f / (2 + f);  // |s| <= 0.1716
  const double z = s * s;
  // To s^22 / 23: what is left out is below 1e-18 of R.
  constexpr double kSeries[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11, 2.0 / 13,
                                2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21, 2.0 / 23};
  double sum = 0;
  for (int i = 10; i >= 0; --i) sum = sum * z + kSeries[i];
  const double half = 0.5 * f * f;
  const double n = static_cast<double>(k);
  return n * kLn2High - ((half - (s * (half + sum * z) + n * kLn2Low)) - f);
}

// Within 4e-16, absolute, which is what a capped logit needs.
constexpr double PortableTanh(double x) {
  if (x > 300) return 1;
  return 1 - 2 / (PortableExp(2 * x) + 1);
}

}  // namespace eduba

#endif  // EDUBA_KERNELS_PORTABLE_MATH_H_
