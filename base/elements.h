#ifndef EDUBA_BASE_ELEMENTS_H_
#define EDUBA_BASE_ELEMENTS_H_

#include <cstdint>

#include "base/dtype.h"

// Loops over arrays of elements of any storage type. Arrays are aligned to their elements.
namespace eduba {

// Rounds `count` elements at `source` to nearest even. The arrays do not overlap.
void ConvertElements(const void* source, DType from, void* target, DType to, int64_t count);

// The first of `count` elements that is NaN or Inf, or -1.
int64_t FirstNonFinite(const void* data, DType dtype, int64_t count);

// Bytes that one position of one layer takes, over all KV heads.
struct RowBytes {
  int64_t keys = 0;
  int64_t values = 0;

  int64_t total() const { return keys + values; }
};
inline RowBytes RowBytesOf(DType dtype, int64_t kv_heads, int64_t head_dim, int64_t value_dim) {
  const int64_t head = static_cast<int64_t>(DTypeBytes(dtype)) * kv_heads;
  return {head * head_dim, head * value_dim};
}

}  // namespace eduba

#endif  // EDUBA_BASE_ELEMENTS_H_
