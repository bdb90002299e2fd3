#include "kernels/log_sum.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/cpu/row_kernels.h"

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/log_sum.cc"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "hwy/targets.h"
#include "kernels/cpu/for_target.h"
#include "kernels/cpu/lane_sum-inl.h"
#include "kernels/cpu/simd_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kSumLanes>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
// Elements that are summed in fp32 before they join the double: 16 a lane.
constexpr int64_t kPiece = 256;

// NaN where one is NaN.
float Largest(const float* x, int64_t count) {
  const DF d;
  VF most = hn::Set(d, -std::numeric_limits<float>::infinity());
  VF nan = hn::Zero(d);
  const auto raise = [&](const float* from) HWY_ATTR {
    const VF value = hn::LoadU(d, from);
    most = hn::IfThenElse(hn::Gt(value, most), value, most);
    nan = hn::IfThenElse(hn::IsNaN(value), value, nan);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) raise(x + i);
  if (i < count) {
    float tail[kLanes];
    std::fill_n(tail, kLanes, x[i]);
    std::copy(x + i, x + count, tail);
    raise(tail);
  }
  float largest[kLanes];
  float nans[kLanes];
  hn::StoreU(most, d, largest);
  hn::StoreU(nan, d, nans);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (std::isnan(nans[lane])) return nans[lane];
    largest[0] = std::max(largest[0], largest[lane]);
  }
  return largest[0];
}

double LogSum(const float* x, int64_t count) {
  const float largest = Largest(x, count);
  if (!std::isfinite(largest)) return largest;
  const VF shift = hn::Set(DF(), largest);
  const float nothing = -std::numeric_limits<float>::infinity();
  const double total = LaneSum<kPiece>(x, count, nothing, [&](VF sum, VF values) HWY_ATTR {
    return hn::Add(sum, Exp(DF(), hn::Sub(values, shift)));
  });
  return largest + std::log(total);
}

LogSumFunction Function() { return LogSum; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Function);

}  // namespace

LogSumFunction LogSumFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Function)(); });
}

double LogSumExp(absl::Span<const float> x) {
  static const LogSumFunction function = LogSumFor(hwy::SupportedAndGeneratedTargets().front());
  return function(x.data(), static_cast<int64_t>(x.size()));
}

}  // namespace eduba
#endif  // HWY_ONCE
