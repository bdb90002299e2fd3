#ifndef EDUBA_COLLECTIVE_PARTS_H_
#define EDUBA_COLLECTIVE_PARTS_H_

#include <cstdint>
#include <numeric>
#include <vector>

#include "absl/types/span.h"
#include "base/check.h"

namespace eduba {

// Returns where the parts of a ReduceScatterI64 begin and where the last one ends: [ranks + 1] for a group of
// `size` ranks. REQUIRES: `counts` are as communicator.h requires for `words` words of data.
inline std::vector<int64_t> PartBegins(absl::Span<const int64_t> counts, int size, size_t words) {
  EDUBA_CHECK_EQ(static_cast<int64_t>(counts.size()), int64_t{size});
  std::vector<int64_t> begins(counts.size() + 1);
  for (const int64_t count : counts) EDUBA_CHECK(count >= 0);
  std::partial_sum(counts.begin(), counts.end(), begins.begin() + 1);
  EDUBA_CHECK_EQ(begins.back(), static_cast<int64_t>(words));
  return begins;
}

// Returns a number that differs where the counts differ: FNV-1a over their words.
inline uint64_t PartsNumber(absl::Span<const int64_t> counts) {
  uint64_t x = 0xcbf29ce484222325U;
  for (const int64_t count : counts) x = (x ^ static_cast<uint64_t>(count)) * 0x100000001b3U;
  return x;
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_PARTS_H_
