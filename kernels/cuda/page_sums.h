#ifndef EDUBA_KERNELS_CUDA_PAGE_SUMS_H_
#define EDUBA_KERNELS_CUDA_PAGE_SUMS_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/portable_math.h"

// From partials to integers: docs/numerics.md section 3. One block takes one row and head and some pages, and
// adds what they quantise to with integer atomics, whose order does not show. See page_attention.h for what a
// Block is.
namespace eduba::cuda {

inline constexpr int kSumThreads = 128;
inline constexpr int kSumPages = 64;  // The pages of a block. 64 terms of at most 2^56 stay below 2^63.

struct SumArgs {
  int value_dim;
  int value_pitch;
  double one;          // 2^fraction bits
  uint64_t limit;      // Largest sum of l, in units of 1 / one.
  double value_limit;  // MergingStep::SumPlan::value_limit
  int64_t row_heads;
  int64_t pages;
  int64_t targets;
  const int64_t* row_head;  // [targets]; null: target i is row head i
  const double* reference;  // [targets]: the logit that weights are relative to
  // [targets, value_dim], or where row_head is null [kv_heads, value_dim]
  const double* unit;
  int query_heads;
  int group;
  const PageEntry* page;  // [pages]
  const float* m;         // The same as in AttendArgs.
  const float* l;
  const float* o;
  // [targets, value_dim + 2]: sums of O and L, and the largest flag (0, 1: the sum of L is above the limit,
  // kFault), 0 at the start; O and L mean nothing where the flag is not 0
  uint64_t* words;
  uint64_t* fault;  // The same as in AttendArgs.

  constexpr int64_t page_groups() const { return (pages + kSumPages - 1) / kSumPages; }
  constexpr int64_t blocks() const { return targets * page_groups(); }
};

struct SumShared {
  double weight[kSumPages];
  double bound[kSumPages];  // A bound of the magnitude of a page's words.
  uint64_t l[kSumPages];
  int take[kSumPages];
};

template <class Block>
EDUBA_DEVICE void SumPages(const Block& block, const SumArgs& args) {
  auto& shared = *reinterpret_cast<SumShared*>(block.shared());
  const int64_t group_of_pages = block.index() % args.page_groups();
  const int64_t target = block.index() / args.page_groups();
  const int64_t row_head = args.row_head != nullptr ? args.row_head[target] : target;
  const double reference = args.reference[target];
  const int64_t unit_row = args.row_head != nullptr ? target : row_head % args.query_heads / args.group;
  uint64_t* const words = args.words + target * (args.value_dim + 2);
  uint64_t* const flag = words + args.value_dim + 1;
  const int64_t first = group_of_pages * kSumPages;
  const int pages = static_cast<int>(args.pages - first < kSumPages ? args.pages - first : kSumPages);

  block.Threads([&](int t) {
    if (t >= kSumPages) return;
    shared.take[t] = 0;
    shared.l[t] = 0;
    if (t >= pages) return;
    const int64_t at = (first + t) * args.row_heads + row_head;
    const float m = args.m[at];
    constexpr double kInfinity = std::bit_cast<double>(uint64_t{0x7ff} << 52);
    if (m == -Infinity() || reference == -kInfinity) return;
    if (m == Infinity() || reference == kInfinity) {
      AtomicMax(flag, kFault);
      return;
    }
    const double distance = Sub(static_cast<double>(m), reference);
    const double weight = PortableExp(distance > 700.0 ? 700.0 : distance);  // Out of every range.
    const double l = Mul(Mul(static_cast<double>(args.l[at]), weight), args.one);
    if (l > static_cast<double>(args.limit)) {
      AtomicMax(flag, uint64_t{1});
      return;
    }
    const bool own_units = args.value_limit > 0;
    if (!own_units && l < 0.25) return;  // Every word rounds to 0.
    shared.take[t] = 1;
    shared.weight[t] = weight;
    shared.l[t] = static_cast<uint64_t>(RoundToInteger(l));
    // |o| <= l 2^e, but for rounding, or a value is beyond its channel's exponent.
    shared.bound[t] = own_units ? args.value_limit : Add(Mul(1.001, l), 1.0);
  });

  block.Threads([&](int t) {
    if (t == 0) {
      uint64_t sum = 0;
      for (int p = 0; p < pages; ++p) sum += shared.l[p];
      AddToTotal(&words[args.value_dim], sum, false, args.limit);
    }
    for (int c = t; c < args.value_dim; c += kSumThreads) {
      const double unit = args.unit[unit_row * args.value_dim + c];
      uint64_t sum = 0;
      for (int p = 0; p < pages; ++p) {
        if (shared.take[p] == 0) continue;
        const float o = args.o[((first + p) * args.row_heads + row_head) * args.value_pitch + c];
        const double x = Mul(Mul(static_cast<double>(o), shared.weight[p]), unit);
        if (x <= shared.bound[p] && x >= -shared.bound[p]) {
          sum += static_cast<uint64_t>(RoundToInteger(x));
        } else {
          AtomicMax(args.fault, FaultKey(args.page[first + p].index, row_head));
          AtomicMax(flag, kFault);
        }
      }
      if (sum != 0) AtomicAdd(&words[c], sum);
    }
  });
}

struct MagnitudeArgs {
  int value_dim;
  int value_pitch;
  int64_t row_heads;
  int64_t pages;
  int64_t targets;
  const int64_t* row_head;  // [targets]
  const float* m;           // The same as in AttendArgs.
  const float* o;
  uint32_t* magnitudes;  // [targets, value_dim]: OrderOf the largest LogMagnitude; 0 at the start

  constexpr int64_t page_groups() const { return (pages + kSumPages - 1) / kSumPages; }
  constexpr int64_t blocks() const { return targets * page_groups(); }
};

// What the units of the maximum path come from. One block takes one row and head and some pages, as SumPages.
template <class Block>
EDUBA_DEVICE void RaiseMagnitudes(const Block& block, const MagnitudeArgs& args) {
  const int64_t target = block.index() / args.page_groups();
  const int64_t row_head = args.row_head[target];
  const int64_t first = block.index() % args.page_groups() * kSumPages;
  const int pages = static_cast<int>(args.pages - first < kSumPages ? args.pages - first : kSumPages);
  block.Threads([&](int t) {
    for (int c = t; c < args.value_dim; c += kSumThreads) {
      float largest = -Infinity();
      for (int p = 0; p < pages; ++p) {
        const int64_t at = (first + p) * args.row_heads + row_head;
        const float m = args.m[at];
        if (m == -Infinity()) continue;
        const float magnitude = LogMagnitude(m, args.o[at * args.value_pitch + c]);
        if (magnitude > largest) largest = magnitude;
      }
      if (largest != -Infinity()) AtomicMax(&args.magnitudes[target * args.value_dim + c], OrderOf(largest));
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_SUMS_H_
