#include "kernels/activation.h"

#include <algorithm>

#include "kernels/cpu/row_kernels.h"

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "kernels/cpu/for_target.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// 1 / (1 + exp(-x)): exp of -|x| cannot overflow.
HWY_INLINE VF Sigmoid(VF x) {
  const DF d;
  const VF one = hn::Set(d, 1.0F);
  const VF e = Exp(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Ge(x, hn::Zero(d)), one, e), hn::Add(one, e));
}

struct Silu {
  static HWY_INLINE VF Of(VF x) { return hn::Mul(x, Sigmoid(x)); }
};

struct GeluTanh {
  // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
  static HWY_INLINE VF Of(VF x) {
    const DF d;
    const VF cube = hn::MulAdd(hn::Mul(x, x), hn::Set(d, 0.044715F), hn::Set(d, 1.0F));
    return hn::Mul(x, Sigmoid(hn::Mul(hn::Mul(x, hn::Set(d, 1.5957691216F)), cube)));
  }
};

struct Gelu {
  // With a = |x|: Phi(-a) = exp(-a^2 / 2) R(a), where R = erfcx(a / sqrt 2) / 2 is a polynomial in
  // t = 1 / (1 + 0.4 a), fitted to [0, 14] (Chebyshev nodes, relative weights) within 2.3e-7 R.
  static HWY_INLINE VF Of(VF x) {
    const DF d;
    const VF a = hn::Abs(x);
    const VF one = hn::Set(d, 1.0F);
    const VF t = hn::Div(one, hn::MulAdd(a, hn::Set(d, 0.4F), one));
    VF r = hn::MulAdd(t, hn::Set(d, -0.03980620577931404F), hn::Set(d, 0.20143544673919678F));
    r = hn::MulAdd(r, t, hn::Set(d, -0.3750983774662018F));
    r = hn::MulAdd(r, t, hn::Set(d, 0.25227615237236023F));
    r = hn::MulAdd(r, t, hn::Set(d, -0.013094664551317692F));
    r = hn::MulAdd(r, t, hn::Set(d, 0.1586492508649826F));
    r = hn::MulAdd(r, t, hn::Set(d, 0.15574172139167786F));
    r = hn::MulAdd(r, t, hn::Set(d, 0.15990883111953735F));
    r = hn::MulAdd(r, t, hn::Set(d, -1.2186067579023074e-05F));
    const VF tail = hn::Mul(r, Exp(d, hn::Mul(hn::Mul(a, a), hn::Set(d, -0.5F))));
    const VF phi = hn::IfThenElse(hn::Ge(x, hn::Zero(d)), hn::Sub(one, tail), tail);
    return hn::Mul(x, phi);
  }
};

template <class Function>
void ActivateRow(const float* x, const float* gate, int64_t count, float* y) {
  const DF d;
  const auto one = [&](const float* from, const float* factor, float* to) HWY_ATTR {
    VF value = Function::Of(hn::LoadU(d, from));
    if (factor != nullptr) value = hn::Mul(value, hn::LoadU(d, factor));
    hn::StoreU(value, d, to);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) one(x + i, gate == nullptr ? nullptr : gate + i, y + i);
  if (i < count) {
    float from[kLanes] = {};
    float factor[kLanes] = {};
    float to[kLanes];
    std::copy(x + i, x + count, from);
    if (gate != nullptr) std::copy(gate + i, gate + count, factor);
    one(from, gate == nullptr ? nullptr : factor, to);
    std::copy(to, to + (count - i), y + i);
  }
}

void Activate(const ActivationArgs& args) {
  const auto row_function = args.kind == Activation::kSilu      ? ActivateRow<Silu>
                            : args.kind == Activation::kGeluErf ? ActivateRow<Gelu>
                                                                : ActivateRow<GeluTanh>;
  for (int64_t row = 0; row < args.rows; ++row) {
    row_function(args.x + row * args.x_stride,
                 args.gate == nullptr ? nullptr : args.gate + row * args.x_stride, args.dim,
                 args.y + row * args.dim);
  }
}

void Softcap(const SoftcapArgs& args) {
  const DF d;
  const VF cap = hn::Set(d, args.cap);
  const auto one = [&](const float* from, float* to) HWY_ATTR {
    hn::StoreU(hn::Mul(cap, Tanh(d, hn::Div(hn::LoadU(d, from), cap))), d, to);
  };
  int64_t i = 0;
  for (; i + kLanes <= args.count; i += kLanes) one(args.x + i, args.x + i);
  if (i < args.count) {
    float buffer[kLanes] = {};
    std::copy(args.x + i, args.x + args.count, buffer);
    one(buffer, buffer);
    std::copy(buffer, buffer + (args.count - i), args.x + i);
  }
}

ActivationFunctions Functions() { return {Activate, Softcap}; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Functions);

}  // namespace

ActivationFunctions ActivationFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Functions)(); });
}

}  // namespace eduba
#endif  // HWY_ONCE
