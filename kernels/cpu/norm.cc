#include "kernels/norm.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/row_kernels.h"

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "kernels/cpu/for_target.h"
#include "kernels/cpu/lane_sum-inl.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kSumLanes>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
// Elements that are summed in fp32 before they join the double.
constexpr int kPiece = 1024;

// Sums of (x - shift), or of its squares.
template <bool kSquares>
double Sum(const float* x, int dim, float shift_value) {
  const VF shift = hn::Set(DF(), shift_value);
  return LaneSum<kPiece>(x, dim, shift_value, [&](VF sum, VF values) HWY_ATTR {
    const VF a = hn::Sub(values, shift);
    return kSquares ? hn::MulAdd(a, a, sum) : hn::Add(sum, a);
  });
}

void NormaliseVector(const NormArgs& args, const float* x, float* y) {
  const DF d;
  const int dim = args.dim;
  const bool layer = args.kind == NormKind::kLayer;
  const auto mean = layer ? static_cast<float>(Sum<false>(x, dim, 0) / dim) : 0.0F;
  const double variance = Sum<true>(x, dim, mean) / dim;
  const auto factor = static_cast<float>(1 / std::sqrt(variance + static_cast<double>(args.epsilon)));
  const VF shift = hn::Set(d, mean);
  const VF scale = hn::Set(d, factor);
  const VF offset = hn::Set(d, args.weight_offset);
  const auto one = [&](const float* from, const float* weight, const float* bias, float* to) HWY_ATTR {
    VF value = hn::Mul(hn::Sub(hn::LoadU(d, from), shift), scale);
    value = hn::Mul(value, hn::Add(hn::LoadU(d, weight), offset));
    if (bias != nullptr) value = hn::Add(value, hn::LoadU(d, bias));
    hn::StoreU(value, d, to);
  };
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    one(x + i, args.weight + i, args.bias == nullptr ? nullptr : args.bias + i, y + i);
  }
  if (i < dim) {
    float from[kLanes] = {};
    float weight[kLanes] = {};
    float bias[kLanes] = {};
    float to[kLanes];
    std::copy(x + i, x + dim, from);
    std::copy(args.weight + i, args.weight + dim, weight);
    if (args.bias != nullptr) std::copy(args.bias + i, args.bias + dim, bias);
    one(from, weight, args.bias == nullptr ? nullptr : bias, to);
    std::copy(to, to + (dim - i), y + i);
  }
}

void Normalise(const NormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.heads; ++head) {
      NormaliseVector(args, args.x + row * args.x_stride + head * args.dim,
                      args.y + row * args.y_stride + head * args.dim);
    }
  }
}

NormaliseFunction Function() { return Normalise; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Function);

}  // namespace

NormaliseFunction NormaliseFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Function)(); });
}

}  // namespace eduba
#endif  // HWY_ONCE
