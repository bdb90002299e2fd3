// The products of score_dot.h by dot products of pairs.

#include "kernels/cpu/score_dot.h"

#include <array>
#include <utility>

#include "kernels/cpu/page_layout.h"
#include "kernels/cpu/pair_dot.h"

#if defined(__x86_64__)
namespace eduba {
namespace {

constexpr int kLanes = kPairDotLanes;
constexpr int kVectors = kKeyBlockRows / kLanes;
constexpr int64_t kRowBytes = kKeyBlockRows * 2;

// From two rows of a block to pairs of dimensions. Word i of a row holds key i and, above it, key i + 16.
alignas(64) constexpr std::array<int16_t, 32> kOfLow = {0,  32, 2,  34, 4,  36, 6,  38, 8,  40, 10,
                                                        42, 12, 44, 14, 46, 16, 48, 18, 50, 20, 52,
                                                        22, 54, 24, 56, 26, 58, 28, 60, 30, 62};
alignas(64) constexpr std::array<int16_t, 32> kOfHigh = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11,
                                                         43, 13, 45, 15, 47, 17, 49, 19, 51, 21, 53,
                                                         23, 55, 25, 57, 27, 59, 29, 61, 31, 63};

template <int kQueries>
EDUBA_PAIR_DOT inline void AddPair(__m512i first, __m512i second, const Bf16Pair* const* queries, int pair,
                                   __m512 (&sum)[kQueries][kVectors]) {
  const __m512i keys[kVectors] = {
      _mm512_permutex2var_epi16(first, _mm512_load_si512(kOfLow.data()), second),
      _mm512_permutex2var_epi16(first, _mm512_load_si512(kOfHigh.data()), second)};
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(queries[q][pair]));
    for (int v = 0; v < kVectors; ++v) {
      sum[q][v] = PairDot(sum[q][v], x, keys[v]);
    }
  }
}

template <int kQueries>
EDUBA_PAIR_DOT void Score(const ScoreDotCall& call) {
  __m512 sum[kQueries][kVectors];
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) sum[q][v] = _mm512_setzero_ps();
  }
  const char* at = static_cast<const char*>(call.keys);
  const int whole = call.head_dim / 2;
  for (int pair = 0; pair < whole; ++pair, at += 2 * kRowBytes) {
    _mm_prefetch(at + call.ahead, _MM_HINT_T1);
    _mm_prefetch(at + call.ahead + kRowBytes, _MM_HINT_T1);
    AddPair<kQueries>(_mm512_loadu_si512(at), _mm512_loadu_si512(at + kRowBytes), call.queries, pair, sum);
  }
  if (call.head_dim % 2 > 0) {
    AddPair<kQueries>(_mm512_loadu_si512(at), _mm512_setzero_si512(), call.queries, whole, sum);
  }
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(call.scores + q * call.score_pitch + v * kLanes, sum[q][v]);
    }
  }
}

template <int... kCounts>
const ScoreDotFunction* Table(std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr ScoreDotFunction kTable[] = {Score<kCounts + 1>...};
  return kTable;
}

}  // namespace

const ScoreDotFunction* ScoreDotsOfTheChip() {
  return HasPairDot() ? Table(std::make_integer_sequence<int, kPairDotRowsMax>()) : nullptr;
}

}  // namespace eduba

#else

namespace eduba {

const ScoreDotFunction* ScoreDotsOfTheChip() { return nullptr; }

}  // namespace eduba

#endif
