#ifndef EDUBA_BASE_DIGEST_H_
#define EDUBA_BASE_DIGEST_H_

#include <cstdint>

namespace eduba {

// A sum of 128-bit hashes modulo 2^128, one hash a row. A sum does not depend on the order of its rows, so
// digests of disjoint sets of rows add up to the digest of their union. The digest of no rows is 0.
struct Digest {
  uint64_t low = 0;
  uint64_t high = 0;

  Digest& operator+=(const Digest& other) {
    low += other.low;
    high += other.high + (low < other.low ? 1 : 0);
    return *this;
  }
  bool operator==(const Digest&) const = default;
};

}  // namespace eduba

#endif  // EDUBA_BASE_DIGEST_H_
