// Sums over a row whose bits do not depend on the width of vectors, once per Highway target.
#if defined(EDUBA_KERNELS_CPU_LANE_SUM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EDUBA_KERNELS_CPU_LANE_SUM_INL_H_
#undef EDUBA_KERNELS_CPU_LANE_SUM_INL_H_
#else
#define EDUBA_KERNELS_CPU_LANE_SUM_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Virtual lanes of a sum.
constexpr int kSumLanes = 16;

// The sum of terms of x [count]: add(sum, values) is one vector's. Pieces of kPiece elements are summed in
// fp32, over 16 lanes and then pairwise over these, and the pieces in double. `neutral` is a value that adds
// nothing.
template <int64_t kPiece, class Add>
HWY_INLINE double LaneSum(const float* HWY_RESTRICT x, int64_t count, float neutral, const Add& add) {
  const hn::CappedTag<float, kSumLanes> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(hn::CappedTag<float, kSumLanes>()));
  constexpr int kVectors = kSumLanes / kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = std::min(count, begin + kPiece);
    hn::Vec<decltype(d)> sum[kVectors];
    for (auto& vector : sum) vector = hn::Zero(d);
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes) {
      for (int v = 0; v < kVectors; ++v) sum[v] = add(sum[v], hn::LoadU(d, x + i + v * kLanes));
    }
    if (i < end) {
      float tail[kSumLanes];
      std::fill_n(tail, kSumLanes, neutral);
      std::copy(x + i, x + end, tail);
      for (int v = 0; v < kVectors; ++v) sum[v] = add(sum[v], hn::LoadU(d, tail + v * kLanes));
    }
    float lanes[kSumLanes];
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, lanes + v * kLanes);
    for (int width = kSumLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    total += lanes[0];
  }
  return total;
}

}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // EDUBA_KERNELS_CPU_LANE_SUM_INL_H_
