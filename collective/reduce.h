#ifndef EDUBA_COLLECTIVE_REDUCE_H_
#define EDUBA_COLLECTIVE_REDUCE_H_

#include <bit>
#include <cstdint>

#include "absl/types/span.h"

// The two element-wise reductions that the transports share. Both are associative and commutative to the bit,
// so no transport has to keep an order.
namespace eduba {

// into[i] += from[i], modulo 2^64. REQUIRES: equal sizes.
inline void AddInto(absl::Span<int64_t> into, absl::Span<const int64_t> from) {
  for (size_t i = 0; i < into.size(); ++i) {
    into[i] = static_cast<int64_t>(static_cast<uint64_t>(into[i]) + static_cast<uint64_t>(from[i]));
  }
}

// Returns an integer that orders as the floats do, with -0 below +0. The comparison `a < b` calls the two
// zeros equal, and then the sign of a maximum would depend on the order of arrival.
inline int32_t FloatOrder(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// into[i] = the larger of into[i] and from[i]. REQUIRES: equal sizes, no NaN.
inline void MaxInto(absl::Span<float> into, absl::Span<const float> from) {
  for (size_t i = 0; i < into.size(); ++i) {
    into[i] = FloatOrder(into[i]) < FloatOrder(from[i]) ? from[i] : into[i];
  }
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_REDUCE_H_
