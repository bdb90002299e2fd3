#include "kernels/merge_kernels.h"

#include <algorithm>
#include <limits>

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/merge_kernels.cc"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "hwy/targets.h"
#include "kernels/cpu/for_target.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Virtual lanes of a sum.
constexpr int kSumLanes = 8;
using DD = hn::CappedTag<double, kSumLanes>;
using DOne = hn::CappedTag<double, 1>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DD()));

// 1 / unit, for a power of two.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Inverse(D d, V unit) {
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::Sub(hn::Set(di, int64_t{2 * 1023} << 52), hn::BitCast(di, unit)));
}

template <class D>
HWY_INLINE void FinalisePart(D d, const FinaliseCall& call, int c) {
  const hn::RebindToSigned<D> di;
  const hn::Rebind<float, D> df;
  auto sum = hn::Zero(d);
  if (call.words != nullptr) {
    const auto word = hn::ConvertTo(d, hn::LoadU(di, call.words + c));
    sum = hn::Mul(hn::Set(d, call.weight), hn::Mul(word, Inverse(d, hn::LoadU(d, call.units + c))));
  }
  const float* HWY_RESTRICT value = call.sink_values + c;
  for (int t = 0; t < call.sinks; ++t, value += call.sink_stride) {
    const auto term = hn::Mul(hn::Set(d, call.sink_weights[t]), hn::PromoteTo(d, hn::LoadU(df, value)));
    sum = hn::Add(sum, term);
  }
  hn::StoreU(hn::DemoteTo(df, hn::Div(sum, hn::Set(d, call.total))), df, call.out + c);
}

void Finalise(const FinaliseCall& call) {
  int c = 0;
  for (; c + kLanes <= call.count; c += kLanes) FinalisePart(DD(), call, c);
  for (; c < call.count; ++c) FinalisePart(DOne(), call, c);
}

double SumSquares(const int64_t* words, const double* units, int count) {
  const DD d;
  const hn::RebindToSigned<DD> di;
  constexpr int kVectors = kSumLanes / kLanes;
  hn::Vec<DD> sum[kVectors];
  for (auto& vector : sum) vector = hn::Zero(d);
  const auto add = [&](const int64_t* word, const double* unit) HWY_ATTR {
    for (int v = 0; v < kVectors; ++v) {
      const auto x = hn::Mul(hn::ConvertTo(d, hn::LoadU(di, word + v * kLanes)),
                             Inverse(d, hn::LoadU(d, unit + v * kLanes)));
      sum[v] = hn::Add(sum[v], hn::Mul(x, x));
    }
  };
  int c = 0;
  for (; c + kSumLanes <= count; c += kSumLanes) add(words + c, units + c);
  if (c < count) {
    int64_t last_words[kSumLanes] = {};
    double last_units[kSumLanes];
    std::fill_n(last_units, kSumLanes, 1.0);
    std::copy(words + c, words + count, last_words);
    std::copy(units + c, units + count, last_units);
    add(last_words, last_units);
  }
  double lanes[kSumLanes];
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, lanes + v * kLanes);
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class D>
HWY_INLINE void UnitsPart(D d, double m, const float* HWY_RESTRICT magnitudes, double fraction_bits,
                          double least_value, const double* HWY_RESTRICT most_values,
                          double* HWY_RESTRICT units) {
  const hn::RebindToSigned<D> di;
  const hn::Rebind<float, D> df;
  const auto infinity = hn::Set(d, std::numeric_limits<double>::infinity());
  const auto reference = hn::Set(d, m);
  const auto least = hn::Set(d, least_value);
  const auto most = hn::LoadU(d, most_values);
  const auto magnitude = hn::PromoteTo(d, hn::LoadU(df, magnitudes));
  // Both were rounded to fp32.
  const auto size = hn::Add(hn::Add(hn::Abs(reference), hn::Abs(magnitude)), hn::Set(d, 100));
  const auto distance = hn::Add(hn::Sub(magnitude, reference), hn::Mul(hn::Set(d, 0x1p-21), size));
  auto exponent = hn::Ceil(hn::Mul(distance, hn::Set(d, 1.4426950408889634)));
  exponent = hn::Min(hn::Max(exponent, least), most);
  exponent = hn::IfThenElse(hn::Eq(magnitude, hn::Neg(infinity)), least, exponent);  // All zeros.
  const auto known = hn::And(hn::Lt(magnitude, infinity), hn::Lt(hn::Abs(reference), infinity));
  exponent = hn::IfThenElse(known, exponent, most);
  // The low bits of the sum are the biased exponent.
  const auto biased = hn::Add(hn::Sub(hn::Set(d, fraction_bits + 1023), exponent), hn::Set(d, 0x1.8p52));
  hn::StoreU(hn::BitCast(d, hn::ShiftLeft<52>(hn::BitCast(di, biased))), d, units);
}

void MaximumUnits(float m, const float* magnitudes, int count, int fraction_bits, double least,
                  const double* most, double* units) {
  int c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    UnitsPart(DD(), m, magnitudes + c, fraction_bits, least, most + c, units + c);
  }
  for (; c < count; ++c) UnitsPart(DOne(), m, magnitudes + c, fraction_bits, least, most + c, units + c);
}

MergeKernels Functions() { return {Finalise, SumSquares, MaximumUnits}; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Functions);

}  // namespace

MergeKernels MergeKernelsFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Functions)(); });
}

const MergeKernels& BestMergeKernels() {
  static const MergeKernels kernels = MergeKernelsFor(hwy::SupportedAndGeneratedTargets().front());
  return kernels;
}

}  // namespace eduba
#endif  // HWY_ONCE
