#ifndef EDUBA_BASE_TESTING_SAME_BITS_H_
#define EDUBA_BASE_TESTING_SAME_BITS_H_

#include <cstring>

#include "absl/types/span.h"

namespace eduba {

// Whether two arrays of floats hold the same bits: NaN equals itself, and 0 differs from -0.
inline bool SameBits(absl::Span<const float> a, absl::Span<const float> b) {
  // memcmp() must not be given the null pointer of an empty array.
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace eduba

#endif  // EDUBA_BASE_TESTING_SAME_BITS_H_
