// Functions of one vector of floats, once per Highway target.
#if defined(EDUBA_KERNELS_CPU_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDUBA_KERNELS_CPU_SIMD_MATH_INL_H_
#undef EDUBA_KERNELS_CPU_SIMD_MATH_INL_H_
#else
#define EDUBA_KERNELS_CPU_SIMD_MATH_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// exp(x) for x <= 1: 0 below -87, NaN for NaN. Within 1.1 ulp.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V round = hn::Set(d, 0x1.8p23F);
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.44269504F), round);
  const V n = hn::Sub(shifted, round);
  V r = hn::MulAdd(n, hn::Set(d, -0.693145751953125F), x);
  r = hn::MulAdd(n, hn::Set(d, -1.428606765330187e-06F), r);
  V p = hn::MulAdd(hn::Set(d, 0.00129408902F), r, hn::Set(d, 0.00836335309F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.0416814387F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.166665763F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.499999553F));
  p = hn::MulAdd(p, hn::Mul(r, r), hn::Add(r, hn::Set(d, 1.0F)));
  // The low bits of `shifted` are n; a multiplication by 2^n keeps NaN.
  const auto bits = hn::ShiftLeft<23>(hn::Add(hn::BitCast(di, shifted), hn::Set(di, 127)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0F)), hn::Mul(p, hn::BitCast(d, bits)));
}

// tanh(u) within 2 ulp.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Tanh(D d, V u) {
  const V size = hn::Abs(u);
  const V z = hn::Mul(u, u);
  V p = hn::MulAdd(hn::Set(d, 0.00229274482F), z, hn::Set(d, -0.00834394526F));
  p = hn::MulAdd(p, z, hn::Set(d, 0.0217689183F));
  p = hn::MulAdd(p, z, hn::Set(d, -0.0539592579F));
  p = hn::MulAdd(p, z, hn::Set(d, 0.133333042F));
  p = hn::MulAdd(p, z, hn::Set(d, -0.333333343F));
  const V small = hn::MulAdd(hn::Mul(p, z), size, size);
  // 1 - 2 e / (1 + e) with e = exp(-2 |u|).
  const V one = hn::Set(d, 1.0F);
  const V e = Exp(d, hn::Mul(size, hn::Set(d, -2.0F)));
  const V large = hn::Sub(one, hn::Div(hn::Add(e, e), hn::Add(one, e)));
  return hn::CopySign(hn::IfThenElse(hn::Lt(size, hn::Set(d, 0.625F)), small, large), u);
}

}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // EDUBA_KERNELS_CPU_SIMD_MATH_INL_H_
