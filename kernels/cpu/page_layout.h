#ifndef EDUBA_KERNELS_CPU_PAGE_LAYOUT_H_
#define EDUBA_KERNELS_CPU_PAGE_LAYOUT_H_

#include <cstdint>

#include "base/dtype.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// Where a page keeps its numbers (docs/adr/0004-page-partials.md says why): a PageHeader, then one block per
// KV head, and in it
//   keys    [256 / 32, head_dim, 32]   transposed in blocks of 32 rows: SIMD lanes are keys, and any head_dim
//                                      fits
//   values  [256, value_pitch]         value_pitch = value_dim rounded up to 16, the rest zeros: lanes are
//                                      channels
// Every part is a multiple of 64 bytes.
inline constexpr int kKeyBlockRows = 32;
inline constexpr int kValueAlign = 16;

struct CpuPageLayout {
  explicit CpuPageLayout(const AttentionShape& shape)
      : head_dim(shape.head_dim),
        value_dim(shape.value_dim),
        value_pitch((shape.value_dim + kValueAlign - 1) / kValueAlign * kValueAlign),
        kv_heads(shape.kv_heads),
        key_element(static_cast<int64_t>(DTypeBytes(shape.key_dtype))),
        value_element(static_cast<int64_t>(DTypeBytes(shape.value_dtype))),
        paired_keys(shape.key_dtype == DType::kBf16) {}

  int64_t key_bytes() const { return kPageRows * head_dim * key_element; }
  int64_t value_bytes() const { return kPageRows * value_pitch * value_element; }
  int64_t head_bytes() const { return key_bytes() + value_bytes(); }
  int64_t page_bytes() const { return keys(kv_heads); }

  // Byte offsets inside a page.
  int64_t keys(int64_t kv_head) const {
    return static_cast<int64_t>(sizeof(PageHeader)) + kv_head * head_bytes();
  }
  int64_t values(int64_t kv_head) const { return keys(kv_head) + key_bytes(); }
  // Element offsets inside one head's keys or values.
  int64_t key(int64_t row, int64_t d) const {
    const int64_t in_block = row % kKeyBlockRows;
    return ((row / kKeyBlockRows) * head_dim + d) * kKeyBlockRows +
           (paired_keys ? in_block % (kKeyBlockRows / 2) * 2 + in_block / (kKeyBlockRows / 2) : in_block);
  }
  int64_t value(int64_t row, int64_t c) const { return row * value_pitch + c; }

  int64_t head_dim;
  int64_t value_dim;
  int64_t value_pitch;
  int64_t kv_heads;
  int64_t key_element;  // Bytes.
  int64_t value_element;
  bool paired_keys;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_PAGE_LAYOUT_H_
