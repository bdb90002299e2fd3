#include "kernels/rope.h"

#include <algorithm>

#include "kernels/cpu/row_kernels.h"

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "kernels/cpu/for_target.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Pairs [i, i + lanes of D) of one head.
template <class D>
HWY_INLINE void RotatePairs(D d, int i, int half, const float* cosines, const float* sines, const float* x,
                            float* y) {
  const auto c = hn::LoadU(d, cosines + i);
  const auto s = hn::LoadU(d, sines + i);
  const auto a = hn::LoadU(d, x + i);
  const auto b = hn::LoadU(d, x + half + i);
  hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, y + i);
  hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, y + half + i);
}

void Rotate(const RopeArgs& args) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> one;
  const int half = args.rotary_dim / 2;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* cosines = args.cosines + row * half;
    const float* sines = args.sines + row * half;
    for (int64_t head = 0; head < args.heads; ++head) {
      const float* x = args.x + row * args.x_stride + head * args.dim;
      float* y = args.y + row * args.y_stride + head * args.dim;
      int i = 0;
      for (; i + lanes <= half; i += lanes) RotatePairs(d, i, half, cosines, sines, x, y);
      for (; i < half; ++i) RotatePairs(one, i, half, cosines, sines, x, y);
      if (x != y) std::copy(x + args.rotary_dim, x + args.dim, y + args.rotary_dim);
    }
  }
}

RotateFunction Function() { return Rotate; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Function);

}  // namespace

RotateFunction RotateFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Function)(); });
}

}  // namespace eduba
#endif  // HWY_ONCE
