#ifndef EDUBA_MODEL_DIGEST_H_
#define EDUBA_MODEL_DIGEST_H_

#include <xxhash.h>

#include <cstdint>

#include "absl/types/span.h"

namespace eduba {

// The hash of what came before, `hash`, and then of some numbers. Ranks compare what they computed by it.
template <typename T>
uint64_t HashInto(uint64_t hash, absl::Span<const T> numbers) {
  return XXH3_64bits_withSeed(numbers.data(), numbers.size() * sizeof(T), hash);
}

}  // namespace eduba

#endif  // EDUBA_MODEL_DIGEST_H_
