#ifndef EDUBA_KERNELS_ROW_SET_H_
#define EDUBA_KERNELS_ROW_SET_H_

#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/backend.h"

namespace eduba {

// Whether a live mask (PageRef::live) has a row.
inline bool IsLive(const uint64_t* live, int row) { return (live[row / 64] >> (row % 64) & 1) != 0; }

// A set of rows of a page, in the form of a live mask.
struct RowSet {
  uint64_t words[kLiveWords] = {};

  // Adds rows [begin, end), cut to the page.
  void Add(int64_t begin, int64_t end) {
    for (int word = 0; word < kLiveWords; ++word) {
      const int64_t first = std::clamp<int64_t>(begin - 64 * word, 0, 64);
      const int64_t last = std::clamp<int64_t>(end - 64 * word, 0, 64);
      if (first < last) words[word] |= (~uint64_t{0} >> (64 - (last - first))) << first;
    }
  }
  // Takes away the rows that are not in `live`.
  void Keep(const uint64_t* live) {
    for (int word = 0; word < kLiveWords; ++word) words[word] &= live[word];
  }
  bool Has(int row) const { return IsLive(words, row); }
  int64_t count() const {
    int64_t count = 0;
    for (const uint64_t word : words) count += std::popcount(word);
    return count;
  }
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_ROW_SET_H_
