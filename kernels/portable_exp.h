#ifndef EDUBA_KERNELS_PORTABLE_EXP_H_
#define EDUBA_KERNELS_PORTABLE_EXP_H_

#include <bit>
#include <cstdint>

namespace eduba {

// exp(x) in double from additions and multiplications alone (build with -ffp-contract=off), so that ranks
// with different C libraries weigh their pages with the same bits. Within 2 ulp. Below -708 it is 0; x must
// not exceed 708; NaN stays NaN.
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

// tanh(x) within a few 1e-16, absolute, which is what a capped logit needs.
constexpr double PortableTanh(double x) {
  if (x > 300) return 1;
  if (x < -300) return -1;
  return 1 - 2 / (PortableExp(2 * x) + 1);
}

}  // namespace eduba

#endif  // EDUBA_KERNELS_PORTABLE_EXP_H_
