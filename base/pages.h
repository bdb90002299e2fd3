#ifndef EDUBA_BASE_PAGES_H_
#define EDUBA_BASE_PAGES_H_

#include <algorithm>
#include <cstdint>

namespace eduba {

// A page is 256 consecutive positions, aligned at multiples of 256: the unit of storage, placement, compute
// and erasure.
inline constexpr int kPageRows = 256;
// Positions a sequence may have. With F' = 62 - ceil(log2(positions + 1)) (docs/numerics.md) 32 fraction bits
// remain.
inline constexpr int64_t kMaxPositions = int64_t{1} << 30;
// Workers in one reducing group: 64 sums of at most 2^10 * 2^46 still fit into int64.
inline constexpr int kMaxGroupSize = 64;

inline int64_t PageOf(int64_t position) { return position / kPageRows; }
inline int64_t PageBegin(int64_t page) { return page * kPageRows; }
// Pages that `positions` positions from 0 occupy.
inline int64_t PageCount(int64_t positions) { return (positions + kPageRows - 1) / kPageRows; }
// The stripe (run of `stripe_pages` pages placed together) that holds `position`.
inline int64_t StripeOf(int64_t position, int64_t stripe_pages) { return PageOf(position) / stripe_pages; }

// Positions [begin, end). Empty when begin >= end.
struct PositionRange {
  int64_t begin = 0;
  int64_t end = 0;

  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
  PositionRange Intersect(PositionRange other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
  bool operator==(const PositionRange&) const = default;
};

}  // namespace eduba

#endif  // EDUBA_BASE_PAGES_H_
