#include "kernels/cpu/page_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/page_kernels.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "kernels/cpu/flushed_subnormals.h"
#include "kernels/cpu/for_target.h"
#include "kernels/cpu/page_layout.h"
#include "kernels/cpu/simd_math-inl.h"
#include "kernels/portable_math.h"
#include "kernels/row_set.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Dimensions of a segment of a dot product; fixes the arithmetic of a logit (docs/numerics.md section 2).
// Segments are summed from zero.
constexpr int DotSegment(int head_dim) { return head_dim <= 16 ? 8 : 16; }
// Dimensions of the segments, one or two, that are added up in one float. The sum of the groups is kept in
// two.
constexpr int DotGroup(int head_dim) { return head_dim <= 32 ? DotSegment(head_dim) : 32; }
// From a dot product in the scratch to what its rounding left, and to the first segment of the group under
// way.
constexpr int kLowOffset = kMaxPageQueries * kScorePitch;
constexpr int kSegmentOffset = 2 * kLowOffset;
// Rows of values summed from zero before they join the total.
constexpr int kRowSegment = 64;
// Virtual lanes of the sum of weights.
constexpr int kSumLanes = 16;
constexpr int kLineBytes = 64;
// Lines of the next page that are asked for between the loops over keys and values: for each query's softmax,
// which takes as long as so many lines from memory, and at the end of the page.
constexpr int64_t kSoftmaxLines = 24;
constexpr int64_t kEndLines = 64;
// How far beyond the loads to prefetch, in bytes: the hardware's own prefetching does not reach so far at the
// start of every 4 KiB.
constexpr int kPrefetchBytes = 4096;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
// Registers for accumulators are kMaxTile * 2: 12 of AVX2's 16, 24 of AVX-512's 32.
constexpr int kMaxTile = kLanes >= 16 ? 12 : 6;
constexpr int kHalfBlock = kKeyBlockRows / 2;
constexpr int kKeyPairs = kHalfBlock / kLanes;  // Pairs of vectors in a block of keys.
static_assert(kKeyPairs >= 1);

// How stored elements become pairs of vectors of N lanes.
//   LoadKeys   a: keys 0 to N - 1, b: keys 16 to 16 + N - 1 of a block, `p` at key 0 (CpuPageLayout::key)
//   LoadPair   2 N consecutive elements, in the order that is cheapest to load: bf16 comes as even and odd
//   elements StorePair  puts what LoadPair made back into their natural order
struct F32 {
  using T = float;
  static constexpr int kKeyStride = 1;  // Elements from a key to the next.
  static HWY_INLINE void LoadKeys(DF d, const T* HWY_RESTRICT p, VF& a, VF& b) {
    a = hn::LoadU(d, p);
    b = hn::LoadU(d, p + kHalfBlock);
  }
  template <class D>
  static HWY_INLINE void LoadPair(D d, const T* HWY_RESTRICT p, hn::Vec<D>& a, hn::Vec<D>& b) {
    a = hn::LoadU(d, p);
    b = hn::LoadU(d, p + hn::MaxLanes(d));
  }
  template <class D>
  static HWY_INLINE void StorePair(D d, hn::Vec<D> a, hn::Vec<D> b, float* HWY_RESTRICT p) {
    hn::StoreU(a, d, p);
    hn::StoreU(b, d, p + hn::MaxLanes(d));
  }
};

struct F16 : F32 {
  using T = hwy::float16_t;
  static HWY_INLINE void LoadKeys(DF d, const T* HWY_RESTRICT p, VF& a, VF& b) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    a = hn::PromoteTo(d, hn::LoadU(dh, p));
    b = hn::PromoteTo(d, hn::LoadU(dh, p + kHalfBlock));
  }
  template <class D>
  static HWY_INLINE void LoadPair(D d, const T* HWY_RESTRICT p, hn::Vec<D>& a, hn::Vec<D>& b) {
    const hn::Rebind<hwy::float16_t, D> dh;
    a = hn::PromoteTo(d, hn::LoadU(dh, p));
    b = hn::PromoteTo(d, hn::LoadU(dh, p + hn::MaxLanes(d)));
  }
};

struct Bf16 {
  using T = uint16_t;
  static HWY_INLINE void LoadKeys(DF d, const T* HWY_RESTRICT p, VF& a, VF& b) { LoadPair(d, p, a, b); }
  static constexpr int kKeyStride = 2;
  template <class D>
  static HWY_INLINE void LoadPair(D d, const T* HWY_RESTRICT p, hn::Vec<D>& a, hn::Vec<D>& b) {
    const hn::RebindToUnsigned<D> du;
    const auto pair = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
    a = hn::BitCast(d, hn::ShiftLeft<16>(pair));
    b = hn::BitCast(d, hn::And(pair, hn::Set(du, 0xffff0000U)));
  }
  template <class D>
  static HWY_INLINE void StorePair(D d, hn::Vec<D> a, hn::Vec<D> b, float* HWY_RESTRICT p) {
    if constexpr (hn::MaxLanes(D()) == 1) {
      hn::StoreU(a, d, p);
      hn::StoreU(b, d, p + 1);
    } else {
      hn::StoreInterleaved2(a, b, d, p);
    }
  }
};

// softcap * tanh(scale * dot / softcap), the tanh within 2 ulp.
HWY_INLINE VF Capped(DF d, VF dot, VF scale, VF softcap) {
  return hn::Mul(softcap, Tanh(d, hn::Div(hn::Mul(dot, scale), softcap)));
}

// Asks for `lines` lines from `at` on. Into the second-level cache only: they are needed a page later, and
// would push what is needed now out of the first.
HWY_INLINE void PrefetchLines(const char* at, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + i * kLineBytes, 0, 2);
}

// Asks for the memory that the thread reads next, keys and then values, from the first byte to the last, at
// the pace at which it can come: memory that is not asked for while a thread does something else is lost
// time. The loops over keys and values ask for a little less than what they read, and what is left over is
// asked for where nothing is read.
class Fetch {
 public:
  // `bytes` from `from` on, `gaps` of them between the loops.
  Fetch(const void* from, int64_t bytes, int64_t gaps)
      : at_(static_cast<const char*>(from)),
        end_(at_ + bytes),
        pace_(static_cast<int>(kWhole - kWhole * gaps / bytes)) {}
  // One that asks for nothing new.
  explicit Fetch(const void* from) : at_(static_cast<const char*>(from)), end_(at_), pace_(0) {}

  // For a loop whose steps read kBytes each: the loop's own copy of where it asks, which comes back with
  // Resume.
  class Loop {
   public:
    Loop(const char* at, int64_t step) : at_(at), step_(step) {}
    template <int kBytes>
    HWY_INLINE void Step() {
      HWY_UNROLL(4)
      for (int i = 0; i < kBytes; i += kLineBytes) __builtin_prefetch(at_ + i, 0, 2);
      at_ += step_;
    }
    const char* at() const { return at_; }

   private:
    const char* at_;
    const int64_t step_;
  };
  template <int kBytes>
  HWY_INLINE Loop Start() const {
    return Loop(at_, kBytes * pace_ / kWhole);
  }
  void Resume(const Loop& loop) { at_ = loop.at(); }

  // Between the loops.
  HWY_INLINE void Lines(int64_t lines) {
    lines = std::min(lines, LinesLeft());
    PrefetchLines(at_, lines);
    at_ += lines * kLineBytes;
  }
  int64_t LinesLeft() const { return (end_ - at_ + kLineBytes - 1) / kLineBytes; }

 private:
  static constexpr int kWhole = 256;

  const char* at_;
  const char* const end_;
  const int pace_;  // Bytes that a loop asks for per byte it reads, in units of 1 / kWhole.
};

// Dot products of kQueries query vectors with kPairs pairs of vectors of a block's keys, from pair `first`,
// as two numbers: scores, and kLowOffset after it what the scores' rounding left (nothing where one group
// holds all dimensions). Rows of scores are kScorePitch apart.
template <class Type, int kQueries, int kPairs>
HWY_INLINE void ScoreTile(const typename Type::T* HWY_RESTRICT block, int first, int head_dim,
                          const float* const* query, Fetch& fetch, float* HWY_RESTRICT scores) {
  constexpr int kBytes = 2 * kPairs * kLanes * static_cast<int>(sizeof(*block));
  const DF d;
  const typename Type::T* HWY_RESTRICT from = block + first * kLanes * Type::kKeyStride;
  scores += first * kLanes;
  Fetch::Loop ahead = fetch.Start<kBytes>();
  const int segment = DotSegment(head_dim);
  const int group = DotGroup(head_dim);
  int group_begin = 0;
  for (int begin = 0; begin < head_dim; begin += segment) {
    const int end = std::min(begin + segment, head_dim);
    VF sum[kQueries][2 * kPairs];
    HWY_UNROLL(kMaxTile)
    for (auto& row : sum) {
      HWY_UNROLL(8)
      for (auto& vector : row) vector = hn::Zero(d);
    }
    for (int i = begin; i < end; ++i) {
      const typename Type::T* HWY_RESTRICT keys = from + static_cast<int64_t>(i) * kKeyBlockRows;
      ahead.Step<kBytes>();
      VF key[2 * kPairs];
      HWY_UNROLL(4)
      for (int p = 0; p < kPairs; ++p) {
        Type::LoadKeys(d, keys + p * kLanes * Type::kKeyStride, key[2 * p], key[2 * p + 1]);
      }
      HWY_UNROLL(kMaxTile)
      for (int q = 0; q < kQueries; ++q) {
        const VF x = hn::Set(d, query[q][i]);
        HWY_UNROLL(8)
        for (int v = 0; v < 2 * kPairs; ++v) sum[q][v] = hn::MulAdd(x, key[v], sum[q][v]);
      }
    }
    const auto each_sum = [&](const auto& body) HWY_ATTR {
      HWY_UNROLL(kMaxTile)
      for (int q = 0; q < kQueries; ++q) {
        HWY_UNROLL(8)
        for (int v = 0; v < 2 * kPairs; ++v) {
          body(sum[q][v], scores + q * kScorePitch + v / 2 * kLanes + v % 2 * kHalfBlock);
        }
      }
    };
    const bool is_second = begin > group_begin;
    if (!is_second && end < std::min(begin + group, head_dim)) {
      each_sum([&](VF total, float* HWY_RESTRICT at) HWY_ATTR { hn::StoreU(total, d, at + kSegmentOffset); });
      continue;
    }
    if (is_second) {
      each_sum([&](VF& total, float* HWY_RESTRICT at)
                   HWY_ATTR { total = hn::Add(hn::LoadU(d, at + kSegmentOffset), total); });
    }
    // high + low is exactly what the groups before and this one add up to.
    const auto add_group = [&](VF total, float* HWY_RESTRICT at) HWY_ATTR {
      const VF before = hn::LoadU(d, at);
      const VF high = hn::Add(before, total);
      const VF part = hn::Sub(high, before);
      hn::StoreU(high, d, at);
      return hn::Add(hn::Sub(before, hn::Sub(high, part)), hn::Sub(total, part));
    };
    if (group_begin == 0) {
      each_sum([&](VF total, float* HWY_RESTRICT at) HWY_ATTR { hn::StoreU(total, d, at); });
    } else if (group_begin == group) {
      each_sum([&](VF total, float* HWY_RESTRICT at)
                   HWY_ATTR { hn::StoreU(add_group(total, at), d, at + kLowOffset); });
    } else {
      each_sum([&](VF total, float* HWY_RESTRICT at) HWY_ATTR {
        hn::StoreU(hn::Add(add_group(total, at), hn::LoadU(d, at + kLowOffset)), d, at + kLowOffset);
      });
    }
    group_begin = end;
  }
  fetch.Resume(ahead);
}

// Pairs that a tile of so many queries takes at once: enough chains to hide the latency, within the
// registers.
constexpr int PairsFor(int queries, int most) {
  const int fit = std::max(1, kMaxTile / queries);
  return std::min({fit >= 4 ? 4 : fit >= 2 ? 2 : 1, most, queries == 1 ? 4 : 2});
}

template <class Type, int kQueries>
void ScoreBlock(const void* block, int head_dim, const float* const* query, Fetch& fetch, float* scores) {
  constexpr int kPairs = PairsFor(kQueries, kKeyPairs);
  constexpr int kPasses = kKeyPairs / kPairs;
  static_assert(kKeyPairs % kPairs == 0);
  for (int p = 0; p < kPasses; ++p) {
    ScoreTile<Type, kQueries, kPairs>(static_cast<const typename Type::T*>(block), p * kPairs, head_dim,
                                      query, fetch, scores);
  }
}

// score_dot.h's products: a pair of dimensions is two multiply-adds, the second dimension's first.
template <int kQueries>
void ScoreDot(const ScoreDotCall& call) {
  const DF d;
  const auto* keys = static_cast<const Bf16::T*>(call.keys);
  for (int first = 0; first < kHalfBlock; first += kLanes) {
    VF sum[kQueries][2];
    HWY_UNROLL(kMaxTile)
    for (auto& row : sum) row[0] = row[1] = hn::Zero(d);
    for (int i = 0; i < call.head_dim; i += 2) {
      HWY_UNROLL(2)
      for (int s = 1; s >= 0; --s) {
        VF low = hn::Zero(d);
        VF high = low;
        if (i + s < call.head_dim) {
          Bf16::LoadKeys(d, keys + static_cast<int64_t>(i + s) * kKeyBlockRows + first * Bf16::kKeyStride,
                         low, high);
        }
        HWY_UNROLL(kMaxTile)
        for (int q = 0; q < kQueries; ++q) {
          const Bf16Pair pair = call.queries[q][i / 2];
          const VF x = hn::Set(d, std::bit_cast<float>(s == 0 ? pair << 16 : pair & 0xffff0000U));
          sum[q][0] = hn::MulAdd(x, low, sum[q][0]);
          sum[q][1] = hn::MulAdd(x, high, sum[q][1]);
        }
      }
    }
    HWY_UNROLL(kMaxTile)
    for (int q = 0; q < kQueries; ++q) {
      hn::StoreU(sum[q][0], d, call.scores + q * call.score_pitch + first);
      hn::StoreU(sum[q][1], d, call.scores + q * call.score_pitch + first + kHalfBlock);
    }
  }
}

// sum[q][c] += weight[q][row] * values[row][c] for rows [begin, end) and kPairs pairs of vectors of channels
// from `first`. `sum` and `total` rows are `pitch` apart and hold pairs in LoadPair's order. The sum starts
// from zero where `fresh`, and joins the total where `last`.
template <class Type, class D, int kQueries, int kPairs>
HWY_INLINE void WeighTile(D d, const typename Type::T* HWY_RESTRICT values, int pitch, int first, int begin,
                          int end, bool fresh, bool last, Fetch& fetch, const float* HWY_RESTRICT weight,
                          float* HWY_RESTRICT sums, float* HWY_RESTRICT totals) {
  using V = hn::Vec<D>;
  constexpr int kN = static_cast<int>(hn::MaxLanes(D()));
  constexpr int kBytes = 2 * kPairs * kN * static_cast<int>(sizeof(*values));
  sums += first;
  totals += first;
  V sum[kQueries][2 * kPairs];
  HWY_UNROLL(kMaxTile)
  for (int q = 0; q < kQueries; ++q) {
    HWY_UNROLL(8)
    for (int v = 0; v < 2 * kPairs; ++v) {
      sum[q][v] = fresh ? hn::Zero(d) : hn::LoadU(d, sums + q * pitch + v * kN);
    }
  }
  Fetch::Loop ahead = fetch.Start<kBytes>();
  for (int row = begin; row < end; ++row) {
    const typename Type::T* HWY_RESTRICT at = values + static_cast<int64_t>(row) * pitch + first;
    ahead.Step<kBytes>();
    V value[2 * kPairs];
    HWY_UNROLL(4)
    for (int p = 0; p < kPairs; ++p) Type::LoadPair(d, at + p * 2 * kN, value[2 * p], value[2 * p + 1]);
    HWY_UNROLL(kMaxTile)
    for (int q = 0; q < kQueries; ++q) {
      const V w = hn::Set(d, weight[q * kScorePitch + row]);
      HWY_UNROLL(8)
      for (int v = 0; v < 2 * kPairs; ++v) sum[q][v] = hn::MulAdd(w, value[v], sum[q][v]);
    }
  }
  fetch.Resume(ahead);
  HWY_UNROLL(kMaxTile)
  for (int q = 0; q < kQueries; ++q) {
    HWY_UNROLL(8)
    for (int v = 0; v < 2 * kPairs; ++v) {
      const int at = q * pitch + v * kN;
      if (last) {
        hn::StoreU(hn::Add(hn::LoadU(d, totals + at), sum[q][v]), d, totals + at);
      } else {
        hn::StoreU(sum[q][v], d, sums + at);
      }
    }
  }
}

// The tag for the last 16 channels where a pair of full vectors holds 32.
using DTail = hn::CappedTag<float, kValueAlign / 2>;

template <class Type, int kQueries>
void WeighRows(const void* values, int pitch, int begin, int end, bool fresh, bool last, Fetch& fetch,
               const float* weight, float* sums, float* totals) {
  constexpr int kPairs = PairsFor(kQueries, 4);
  constexpr int kPair = 2 * kLanes;
  const auto* from = static_cast<const typename Type::T*>(values);
  int first = 0;
  while (first + kPairs * kPair <= pitch) {
    WeighTile<Type, DF, kQueries, kPairs>(DF(), from, pitch, first, begin, end, fresh, last, fetch, weight,
                                          sums, totals);
    first += kPairs * kPair;
  }
  if constexpr (kPairs > 2) {
    if (first + 2 * kPair <= pitch) {
      WeighTile<Type, DF, kQueries, 2>(DF(), from, pitch, first, begin, end, fresh, last, fetch, weight, sums,
                                       totals);
      first += 2 * kPair;
    }
  }
  if constexpr (kPairs > 1) {
    if (first + kPair <= pitch) {
      WeighTile<Type, DF, kQueries, 1>(DF(), from, pitch, first, begin, end, fresh, last, fetch, weight, sums,
                                       totals);
      first += kPair;
    }
  }
  if (first < pitch) {
    WeighTile<Type, DTail, kQueries, 1>(DTail(), from, pitch, first, begin, end, fresh, last, fetch, weight,
                                        sums, totals);
  }
}

// The sum of a vector's lanes: halves are added until one lane is left.
template <class D, class V = hn::Vec<D>>
HWY_INLINE float HalvedSum(D /*d*/, V v) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (hn::MaxLanes(D()) > 1) {
    const hn::Half<D> half;
    return HalvedSum(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
#endif
  return hn::GetLane(v);
}

// Some neighbouring queries that share loads.
struct Tile {
  int first;
  int count;
  int begin;  // Rows [begin, end) hold everything that one of them sees.
  int end;
  RowSet seen;  // By one of them.
};

// The live mask of a page as SIMD code reads it.
class LiveLanes {
 public:
  explicit LiveLanes(const uint64_t* live) : is_masked_(live != nullptr) {
    for (int row = 0; is_masked_ && row < kPageRows; ++row) lanes_[row] = IsLive(live, row) ? 1.0F : 0.0F;
  }
  bool is_masked() const { return is_masked_; }
  // 1 for each live row, else 0. REQUIRES: is_masked().
  const float* lanes() const { return lanes_; }

 private:
  const bool is_masked_;
  alignas(64) float lanes_[kPageRows];
};

// Which rows of the groups of 16 a query sees.
class VisibleRows {
 public:
  VisibleRows(const PageQueries& page, const LiveLanes& live, int q)
      : live_(live),
        begin_(page.begin[q]),
        end_(page.end[q]),
        whole_end_(live.is_masked() ? 0 : page.end[q]) {}

  // The groups that hold a visible row begin in [first(), stop()).
  int first() const { return begin_ / kSumLanes * kSumLanes; }
  int stop() const { return (end_ + kSumLanes - 1) / kSumLanes * kSumLanes; }
  // Whether all rows of a group are known to be visible. If not, Mask says which are.
  bool IsWhole(int group) const { return group >= begin_ && group + kSumLanes <= whole_end_; }
  HWY_INLINE auto Mask(DF d, int at) const {
    const VF lane = hn::Iota(d, static_cast<float>(at));
    const auto mask = hn::And(hn::Ge(lane, hn::Set(d, static_cast<float>(begin_))),
                              hn::Lt(lane, hn::Set(d, static_cast<float>(end_))));
    if (!live_.is_masked()) return mask;
    return hn::And(mask, hn::Gt(hn::LoadU(d, live_.lanes() + at), hn::Zero(d)));
  }

 private:
  const LiveLanes& live_;
  const int begin_;
  const int end_;
  const int whole_end_;
};

// The first half of a query's softmax: its largest visible logit. With a cap, the logits replace the dot
// products in `row`. `finite` is false when a visible logit is not.
template <bool kCapped>
float LargestLogit(const PageQueries& page, const VisibleRows& visible, float* HWY_RESTRICT row,
                   bool* finite) {
  const DF d;
  constexpr int kVectors = kSumLanes / kLanes;
  const VF scale = hn::Set(d, page.scale);
  const VF softcap = hn::Set(d, page.softcap);
  const VF infinity = hn::Set(d, std::numeric_limits<float>::infinity());
  VF high = hn::Neg(infinity);
  VF low = infinity;
  const int stop = visible.stop();
  for (int group = visible.first(); group < stop; group += kSumLanes) {
    const bool whole = visible.IsWhole(group);
    HWY_UNROLL(kVectors)
    for (int v = 0; v < kVectors; ++v) {
      const int at = group + v * kLanes;
      const VF dot = hn::LoadU(d, row + at);
      VF x;
      if constexpr (kCapped) {
        x = Capped(d, dot, scale, softcap);
        hn::StoreU(x, d, row + at);
      } else {
        x = hn::Mul(dot, scale);
      }
      if (whole) {
        high = hn::Max(high, x);
        low = hn::Min(low, x);
      } else {
        const auto mask = visible.Mask(d, at);
        high = hn::Max(high, hn::IfThenElse(mask, x, hn::Neg(infinity)));
        low = hn::Min(low, hn::IfThenElse(mask, x, infinity));
      }
    }
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(d, high));
  const float smallest = hn::GetLane(hn::MinOfLanes(d, low));
  *finite = largest <= std::numeric_limits<float>::max() && smallest >= std::numeric_limits<float>::lowest();
  return largest;
}

// The second half: weights exp(logit - largest) in place, 0 where a row is not visible. Returns their sum l.
template <bool kCapped, bool kLow>
float WeightsFrom(const PageQueries& page, const VisibleRows& visible, float largest,
                  float* HWY_RESTRICT row) {
  const DF d;
  constexpr int kVectors = kSumLanes / kLanes;
  const VF scale = hn::Set(d, page.scale);
  const VF minus_largest = hn::Set(d, -largest);
  const bool is_fused = std::abs(largest) <= kFusedLogitMax;
  VF sum[kVectors];
  for (auto& vector : sum) vector = hn::Zero(d);
  const int stop = visible.stop();
  for (int group = visible.first(); group < stop; group += kSumLanes) {
    const bool whole = visible.IsWhole(group);
    HWY_UNROLL(kVectors)
    for (int v = 0; v < kVectors; ++v) {
      const int at = group + v * kLanes;
      const VF x = hn::LoadU(d, row + at);
      // Fused with the scale, so that a logit is rounded once, and after the largest was taken away.
      VF y;
      if (kCapped) {
        y = hn::Add(x, minus_largest);
      } else if (is_fused) {
        y = hn::MulAdd(x, scale, minus_largest);
        if constexpr (kLow) y = hn::MulAdd(hn::LoadU(d, row + kLowOffset + at), scale, y);
      } else {
        y = hn::Add(hn::Mul(x, scale), minus_largest);
      }
      VF p = Exp(d, y);
      if (!whole) p = hn::IfThenElseZero(visible.Mask(d, at), p);
      sum[v] = hn::Add(sum[v], p);
      hn::StoreU(p, d, row + at);
    }
  }
  for (int width = kVectors / 2; width > 0; width /= 2) {
    for (int v = 0; v < width; ++v) sum[v] = hn::Add(sum[v], sum[v + width]);
  }
  return HalvedSum(d, sum[0]);
}

// From dot products to weights, in place, and from them to m and l, for a tile's queries: rows that are
// visible, and with 0 the tile's others in multiples of 16. A query's `finite` is false when one of its
// visible logits is not finite. Asks for fetch_lines for each query.
template <bool kCapped, bool kLow>
void Softmax(const PageQueries& page, const LiveLanes& live, const Tile& tile, float* HWY_RESTRICT scores,
             Fetch& fetch, int64_t fetch_lines, bool* finite) {
  // First the largest logits of all queries, so that none waits for the comparisons across lanes.
  float largest[kMaxTile];
  for (int i = 0; i < tile.count; ++i) {
    const int q = tile.first + i;
    fetch.Lines(fetch_lines - fetch_lines / 2);
    largest[i] =
        LargestLogit<kCapped>(page, VisibleRows(page, live, q), scores + q * kScorePitch, &finite[q]);
  }
  const int tile_first = tile.begin / kSumLanes * kSumLanes;
  const int tile_stop = (tile.end + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int i = 0; i < tile.count; ++i) {
    const int q = tile.first + i;
    float* HWY_RESTRICT row = scores + q * kScorePitch;
    fetch.Lines(fetch_lines / 2);
    if (!finite[q]) continue;
    const VisibleRows visible(page, live, q);
    std::fill(row + tile_first, row + visible.first(), 0.0F);
    *page.m[q] = largest[i];
    *page.l[q] = WeightsFrom<kCapped, kLow>(page, visible, largest[i], row);
    std::fill(row + visible.stop(), row + tile_stop, 0.0F);
    finite[q] = *page.l[q] <= std::numeric_limits<float>::max();  // false for NaN
  }
}

// Puts `pitch` totals into their natural order. False when one is not finite.
template <class Type, class D>
HWY_INLINE bool CopyInOrder(D d, const float* HWY_RESTRICT totals, int begin, int end,
                            float* HWY_RESTRICT o) {
  constexpr int kN = static_cast<int>(hn::MaxLanes(D()));
  const auto largest = hn::Set(d, std::numeric_limits<float>::max());
  auto finite = hn::Eq(largest, largest);
  for (int c = begin; c + 2 * kN <= end; c += 2 * kN) {
    const auto a = hn::LoadU(d, totals + c);
    const auto b = hn::LoadU(d, totals + c + kN);
    finite = hn::And(finite, hn::And(hn::Le(hn::Abs(a), largest), hn::Le(hn::Abs(b), largest)));
    Type::StorePair(d, a, b, o + c);
  }
  return hn::AllTrue(d, finite);
}

template <class Type>
bool WriteTotals(const float* totals, int pitch, float* o) {
  const int whole = pitch / (2 * kLanes) * (2 * kLanes);
  bool finite = CopyInOrder<Type>(DF(), totals, 0, whole, o);
  if (whole < pitch) finite &= CopyInOrder<Type>(DTail(), totals, whole, pitch, o);
  return finite;
}

using ScoreFunction = void (*)(const void*, int, const float* const*, Fetch&, float*);
using WeighFunction = void (*)(const void*, int, int, int, bool, bool, Fetch&, const float*, float*, float*);

// The work that depends on the type of the keys.
struct KeyWork {
  int64_t element;             // Bytes.
  const ScoreFunction* score;  // [kMaxTile]: ScoreBlock for 1 to kMaxTile queries.
};
// The work that depends on the type of the values.
struct ValueWork {
  int64_t element;             // Bytes.
  const WeighFunction* weigh;  // [kMaxTile]: WeighRows for 1 to kMaxTile queries.
  bool (*write_totals)(const float* totals, int pitch, float* o);
};

template <class Type, int... kCounts>
KeyWork KeyWorkOf(std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr ScoreFunction kTable[] = {ScoreBlock<Type, kCounts + 1>...};
  return {sizeof(typename Type::T), kTable};
}
template <class Type, int... kCounts>
ValueWork ValueWorkOf(std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr WeighFunction kTable[] = {WeighRows<Type, kCounts + 1>...};
  return {sizeof(typename Type::T), kTable, WriteTotals<Type>};
}

template <int... kCounts>
const ScoreDotFunction* ScoreDots(std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr ScoreDotFunction kTable[] = {ScoreDot<kCounts + 1>...};
  return kTable;
}

KeyWork KeyWorkFor(DType dtype) {
  constexpr auto kCounts = std::make_integer_sequence<int, kMaxTile>();
  switch (dtype) {
    case DType::kBf16:
      return KeyWorkOf<Bf16>(kCounts);
    case DType::kF16:
      return KeyWorkOf<F16>(kCounts);
    case DType::kF32:
      break;
  }
  return KeyWorkOf<F32>(kCounts);
}
ValueWork ValueWorkFor(DType dtype) {
  constexpr auto kCounts = std::make_integer_sequence<int, kMaxTile>();
  switch (dtype) {
    case DType::kBf16:
      return ValueWorkOf<Bf16>(kCounts);
    case DType::kF16:
      return ValueWorkOf<F16>(kCounts);
    case DType::kF32:
      break;
  }
  return ValueWorkOf<F32>(kCounts);
}

// Tiles of about the same size for all queries of a page. Returns their number.
int MakeTiles(const PageQueries& page, Tile* tiles) {
  const int tile_count = (page.queries + kMaxTile - 1) / kMaxTile;
  for (int t = 0; t < tile_count; ++t) {
    Tile& tile = tiles[t];
    tile.first = page.queries * t / tile_count;
    tile.count = page.queries * (t + 1) / tile_count - tile.first;
    tile.begin = *std::min_element(page.begin + tile.first, page.begin + tile.first + tile.count);
    tile.end = *std::max_element(page.end + tile.first, page.end + tile.first + tile.count);
    tile.seen = {};
    for (int q = tile.first; q < tile.first + tile.count; ++q) tile.seen.Add(page.begin[q], page.end[q]);
    if (page.live != nullptr) tile.seen.Keep(page.live);
  }
  return tile_count;
}

// How many lines of the next page are asked for where nothing is read, and of how many bytes of it that is a
// part.
struct FetchPlan {
  int64_t skipped;  // Bytes of the next page that are asked for elsewhere.
  int64_t bytes;    // The bytes that are asked for here.
  int64_t softmax_lines;
  int64_t end_lines;
};
FetchPlan PlanFetch(const PageQueries& page, int64_t key_element, int64_t value_element) {
  const int64_t keys = int64_t{kPageRows} * page.head_dim * key_element;
  const int64_t values = int64_t{kPageRows} * page.value_pitch * value_element;
  FetchPlan plan;
  // Products by score_dots ask for the keys themselves.
  plan.skipped = page.score_dots != nullptr ? keys : 0;
  plan.bytes = keys + values - plan.skipped;
  const int64_t most_lines = plan.bytes / (8 * kLineBytes);
  plan.softmax_lines = std::min(kSoftmaxLines * page.queries, most_lines) / page.queries;
  plan.end_lines = std::min(kEndLines, most_lines);
  return plan;
}

// Dot products of all tiles, block by block of keys, so that all tiles find a block in the first-level cache:
// multiply(keys, tile, index of the tile, scores).
template <class Multiply>
void ForKeyBlocks(const PageQueries& page, int64_t key_element, const Tile* tiles, int tile_count,
                  float* scores, const Multiply& multiply) {
  for (int begin = 0; begin < kPageRows; begin += kKeyBlockRows) {
    const char* keys = static_cast<const char*>(page.keys) + begin * page.head_dim * key_element;
    for (int t = 0; t < tile_count; ++t) {
      const Tile& tile = tiles[t];
      if (static_cast<uint32_t>(tile.seen.words[begin / 64] >> (begin % 64)) == 0) continue;
      multiply(keys, tile, t, scores + tile.first * kScorePitch + begin);
    }
  }
}
static_assert(kKeyBlockRows == 32);

void ScorePage(const PageQueries& page, const KeyWork& work, const Tile* tiles, int tile_count, Fetch& fetch,
               float* scores) {
  // One tile, the first, asks for what comes next.
  Fetch nothing(page.keys);
  if (page.score_dots != nullptr) {
    const FlushedSubnormals flushed;
    ForKeyBlocks(page, work.element, tiles, tile_count, scores,
                 [&](const void* keys, const Tile& tile, int t, float* to) {
                   page.score_dots[tile.count - 1]({keys, page.head_dim, page.rounded + tile.first,
                                                    t == 0 ? page.ahead : 0, to, kScorePitch});
                 });
    return;
  }
  ForKeyBlocks(page, work.element, tiles, tile_count, scores,
               [&](const void* keys, const Tile& tile, int t, float* to) {
                 work.score[tile.count - 1](keys, page.head_dim, page.query + tile.first,
                                            t == 0 ? fetch : nothing, to);
               });
}

// Values, segment by segment. Rows that none of a tile's queries sees are left out: they may hold NaN.
void WeighPage(const PageQueries& page, const ValueWork& work, const Tile* tiles, int tile_count,
               const float* scores, Fetch& fetch, float* sums, float* totals) {
  static_assert(kRowSegment == 64);  // A word of RowSet.
  const int pitch = page.value_pitch;
  Fetch nothing(page.keys);
  for (int segment = 0; segment < kLiveWords; ++segment) {
    for (int t = 0; t < tile_count; ++t) {
      const Tile& tile = tiles[t];
      uint64_t rows = tile.seen.words[segment];
      bool fresh = true;
      while (rows != 0) {
        const int begin = std::countr_zero(rows);
        const int count = std::countr_one(rows >> begin);
        rows &= ~(~uint64_t{0} >> (64 - count) << begin);
        const int row = segment * kRowSegment + begin;
        work.weigh[tile.count - 1](page.values, pitch, row, row + count, fresh, rows == 0,
                                   t == 0 ? fetch : nothing, scores + tile.first * kScorePitch,
                                   sums + tile.first * pitch, totals + tile.first * pitch);
        fresh = false;
      }
    }
  }
}

void AttendPage(const PageQueries& page, float* scratch) {
  const KeyWork keys = KeyWorkFor(page.key_dtype);
  const ValueWork values = ValueWorkFor(page.value_dtype);
  const int pitch = page.value_pitch;
  float* scores = scratch;                                                       // [queries, 256]
  float* sums = scores + kScorePlanes * int64_t{kMaxPageQueries} * kScorePitch;  // [queries, pitch]
  float* totals = sums + static_cast<int64_t>(kMaxPageQueries) * pitch;          // [queries, pitch]
  std::fill_n(totals, static_cast<int64_t>(page.queries) * pitch, 0.0F);
  Tile tiles[kMaxPageQueries];
  const int tile_count = MakeTiles(page, tiles);
  const LiveLanes live(page.live);
  const FetchPlan plan = PlanFetch(page, keys.element, values.element);
  Fetch fetch(static_cast<const char*>(page.keys) + page.ahead + plan.skipped, plan.bytes,
              (plan.softmax_lines * page.queries + plan.end_lines) * kLineBytes);

  ScorePage(page, keys, tiles, tile_count, fetch, scores);
  const bool low = page.score_dots == nullptr && page.head_dim > DotGroup(page.head_dim);
  const auto softmax = page.softcap > 0 ? Softmax<true, false>
                       : low            ? Softmax<false, true>
                                        : Softmax<false, false>;
  bool finite[kMaxPageQueries];
  for (int t = 0; t < tile_count; ++t) {
    softmax(page, live, tiles[t], scores, fetch, plan.softmax_lines, finite);
  }
  WeighPage(page, values, tiles, tile_count, scores, fetch, sums, totals);

  // (Of a page that is seen in part, more is left than can be asked for now.)
  const int64_t lines_each =
      (std::min(fetch.LinesLeft(), 2 * plan.end_lines) + page.queries - 1) / page.queries;
  for (int q = 0; q < page.queries; ++q) {
    fetch.Lines(lines_each);
    if (!values.write_totals(totals + q * pitch, pitch, page.o[q]) || !finite[q]) {
      *page.m[q] = std::numeric_limits<float>::infinity();
      *page.l[q] = 0;
    }
  }
}

bool AddQuantised(const float* o, int count, double weight, const double* unit, double limit,
                  int64_t* words) {
  const hn::ScalableTag<double> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<float, decltype(d)> df;
  constexpr int kN = static_cast<int>(hn::MaxLanes(d));
  // x = high * 2^32 + low, both rounded to integers by an addition that leaves the integer in the last bits.
  // The first step is exact whichever way it rounds, the second decides: ties to even, because 2^32 is even.
  const auto round = hn::Set(d, 0x1.8p52);
  const auto round_bits = hn::BitCast(di, round);
  const auto down = hn::Set(d, 0x1p-32);
  const auto up = hn::Set(d, 0x1p32);
  const auto w = hn::Set(d, weight);
  const auto most = hn::Set(d, limit);
  auto fits = hn::Eq(most, most);
  for (int c = 0; c < count; c += kN) {
    const auto x = hn::Mul(hn::Mul(hn::PromoteTo(d, hn::LoadU(df, o + c)), w), hn::LoadU(d, unit + c));
    fits = hn::And(fits, hn::Le(hn::Abs(x), most));
    const auto high = hn::Add(hn::Mul(x, down), round);
    const auto low = hn::Add(hn::Sub(x, hn::Mul(hn::Sub(high, round), up)), round);
    const auto word = hn::Add(hn::ShiftLeft<32>(hn::Sub(hn::BitCast(di, high), round_bits)),
                              hn::Sub(hn::BitCast(di, low), round_bits));
    hn::StoreU(hn::Add(hn::LoadU(di, words + c), word), di, words + c);
  }
  return hn::AllTrue(d, fits);
}

void RaiseMagnitudes(float m, const float* o, int count, float* magnitudes) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const hn::RebindToSigned<DF> di;
  const VF reference = hn::Set(d, m);
  const VF nothing = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int c = 0; c < count; c += kLanes) {
    const VF value = hn::LoadU(d, o + c);
    const auto biased = hn::And(hn::ShiftRight<23>(hn::BitCast(du, value)), hn::Set(du, 0xff));
    const VF power = hn::ConvertTo(d, hn::Sub(hn::BitCast(di, biased), hn::Set(di, 126)));
    const VF size = hn::Add(reference, hn::Mul(power, hn::Set(d, 0.693147181F)));
    const VF magnitude = hn::IfThenElse(hn::Eq(value, hn::Zero(d)), nothing, size);
    hn::StoreU(hn::Max(hn::LoadU(d, magnitudes + c), magnitude), d, magnitudes + c);
  }
}

uint64_t SumWords(const void* data, int64_t bytes) {
  const hn::ScalableTag<uint64_t> d;
  constexpr int kN = static_cast<int>(hn::MaxLanes(d));
  const auto* words = static_cast<const uint64_t*>(data);
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  auto sum2 = hn::Zero(d);
  auto sum3 = hn::Zero(d);
  for (int64_t i = 0; i < bytes / 8; i += 4 * kN) {
    hwy::Prefetch(reinterpret_cast<const char*>(words + i) + kPrefetchBytes);
    sum0 = hn::Add(sum0, hn::LoadU(d, words + i));
    sum1 = hn::Add(sum1, hn::LoadU(d, words + i + kN));
    sum2 = hn::Add(sum2, hn::LoadU(d, words + i + 2 * kN));
    sum3 = hn::Add(sum3, hn::LoadU(d, words + i + 3 * kN));
  }
  alignas(64) uint64_t lanes[kN];
  hn::Store(hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3)), d, lanes);
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

const PageKernels* Kernels() {
  // HWY_NATIVE_FMA is missing in Highway 1.0.3; AVX2 and better have it on x86.
  static constexpr bool kHasFma = HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON;
  static const PageKernels kKernels = {hwy::TargetName(HWY_TARGET),
                                       kHasFma,
                                       AttendPage,
                                       ScoreDots(std::make_integer_sequence<int, kMaxTile>()),
                                       AddQuantised,
                                       RaiseMagnitudes,
                                       SumWords};
  return &kKernels;
}

}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Kernels);

}  // namespace

std::vector<const PageKernels*> RunnablePageKernels() {
  std::vector<const PageKernels*> runnable;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    runnable.push_back(ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Kernels)(); }));
  }
  return runnable;
}

std::vector<std::string> BuiltPageKernels() {
  std::vector<std::string> names;
  for (int64_t targets = HWY_TARGETS; targets != 0; targets &= targets - 1) {
    names.emplace_back(hwy::TargetName(targets & -targets));
  }
  return names;
}

}  // namespace eduba
#endif  // HWY_ONCE
