#ifndef EDUBA_KERNELS_CPU_PAGE_KERNELS_H_
#define EDUBA_KERNELS_CPU_PAGE_KERNELS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/pages.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/score_dot.h"

namespace eduba {

// Query vectors (rows times the query heads of one KV head) that one call takes.
inline constexpr int kMaxPageQueries = 32;

// One KV head of one page against some query vectors: what it adds to each, as a partial (backend.h, Attend).
struct PageQueries {
  DType key_dtype = DType::kF32;
  DType value_dtype = DType::kF32;
  const uint64_t* live = nullptr;  // PageRef::live
  const void* keys = nullptr;      // In CpuPageLayout.
  const void* values = nullptr;    // In CpuPageLayout.
  int head_dim = 1;
  int value_pitch = 16;
  float scale = 1;
  float softcap = 0;
  // Bytes from these keys to those that this thread reads next (their values follow at the same distance),
  // which are fetched meanwhile. 0: not known, or the same again.
  int64_t ahead = 0;
  int queries = 0;                      // In [1, kMaxPageQueries].
  const float* query[kMaxPageQueries];  // Each [head_dim].
  // Where set, keys are multiplied with queries rounded to bf16 by these (PageKernels::score_dots, or the
  // chip's) instead. REQUIRES: bf16 keys.
  const ScoreDotFunction* score_dots = nullptr;
  const Bf16Pair* rounded[kMaxPageQueries];  // The queries: each [(head_dim + 1) / 2].
  // The live rows of [begin, end) are visible; there is one.
  int begin[kMaxPageQueries];
  int end[kMaxPageQueries];
  float* m[kMaxPageQueries];  // Out: largest logit; +inf when anything was not finite.
  float* l[kMaxPageQueries];  // Out
  float* o[kMaxPageQueries];  // Out: each [value_pitch]
};

// Floats between the scores of neighbouring queries: not a power of two, or they would all fall on the same
// lines of the cache.
inline constexpr int kScorePitch = kPageRows + 16;

// Copies of the scores' shape that the kernel works with.
inline constexpr int kScorePlanes = 3;

// Memory of one thread for AttendPage, 64-byte aligned: floats.
inline int64_t PageScratchFloats(int value_pitch) {
  return int64_t{kMaxPageQueries} * (kScorePlanes * kScorePitch + 2 * int64_t{value_pitch});
}

// The SIMD kernels of one Highway target. Targets with fused multiply-add all give the same bits; so do those
// without.
struct PageKernels {
  const char* target;  // "AVX2"
  bool has_fma;
  // Uses rows that at least one query sees: keys of others in the same blocks of 32 rows are read, and what
  // comes of them is thrown away; values of others are not read.
  void (*attend_page)(const PageQueries& page, float* scratch);
  // score_dot.h's products by this target's own means: entry n - 1 takes n queries, as many as attend_page
  // asks for.
  const ScoreDotFunction* score_dots;
  // words[c] += rint(o[c] * weight * unit[c]) for count values, a multiple of 16. False when one of them
  // exceeds `limit` in magnitude or is NaN; words are then undefined. REQUIRES: limit < 2^62 * 1.5.
  bool (*add_quantised)(const float* o, int count, double weight, const double* unit, double limit,
                        int64_t* words);
  // magnitudes[c] = the larger of it and LogMagnitude(m, o[c]) (merging_step.h), for count values, a multiple
  // of 16.
  void (*raise_magnitudes)(float m, const float* o, int count, float* magnitudes);
  // Sums `bytes` (a multiple of 256) of memory as uint64: the read-only loop that stream bandwidth is
  // measured with.
  uint64_t (*sum_words)(const void* data, int64_t bytes);
};

// Targets that this build has and this machine runs, best first.
std::vector<const PageKernels*> RunnablePageKernels();

// All that this build has, best first: "AVX3", "AVX2", "SSE4", "SCALAR".
std::vector<std::string> BuiltPageKernels();

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_PAGE_KERNELS_H_
