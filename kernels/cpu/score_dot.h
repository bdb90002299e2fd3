#ifndef EDUBA_KERNELS_CPU_SCORE_DOT_H_
#define EDUBA_KERNELS_CPU_SCORE_DOT_H_

#include <cstdint>

#include "kernels/cpu/matmul.h"

namespace eduba {

// Dot products of some queries, rounded to bf16, with the 32 bf16 keys of a block (docs/numerics.md section
// 2.2): scores + q * score_pitch. Each pair of dimensions is added as VDPBF16PS does it, fma(x0, y0, fma(x1,
// y1, sum)) with subnormal numbers as zeros: callers have FlushedSubnormals around them.
struct ScoreDotCall {
  const void* keys = nullptr;  // CpuPageLayout's block
  int head_dim = 1;
  const Bf16Pair* const* queries = nullptr;  // Each [(head_dim + 1) / 2].
  int64_t ahead = 0;                         // Means what PageQueries::ahead means.
  float* scores = nullptr;
  int64_t score_pitch = 0;
};
using ScoreDotFunction = void (*)(const ScoreDotCall& call);

// By AVX512_BF16's dot products: entry n - 1 takes n queries, 1 to 12. Null where this machine has none.
// (page_kernels.cc has them for every target, to the same bits where it fuses multiplication and addition.)
const ScoreDotFunction* ScoreDotsOfTheChip();

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_SCORE_DOT_H_
