#ifndef EDUBA_KERNELS_CUDA_PAGE_LAYOUT_H_
#define EDUBA_KERNELS_CUDA_PAGE_LAYOUT_H_

#include <cstdint>

#include "base/pages.h"

namespace eduba::cuda {

// Where a page of device memory keeps its numbers. One block per KV head, and in it
//   keys    [256 / 32, head_pitch / E, 32, E]   E elements are 16 bytes: a warp whose lanes are 32 keys loads
//                                               512 consecutive bytes, and no lane needs another's part
//   values  [256, value_pitch]                  lanes are channels
// Pitches are dimensions rounded up to 16; the rest is zeros. Plain numbers, shared by host and device.
inline constexpr int kKeyBlockRows = 32;
inline constexpr int kDimAlign = 16;
inline constexpr int kLoadBytes = 16;

// Types of elements, in the order of DType.
enum class Element : uint8_t { kF32, kBf16, kF16 };

struct PageLayout {
  int element;  // Bytes: 2 or 4.
  int kv_heads;
  int head_dim;
  int value_dim;
  int head_pitch;
  int value_pitch;

  constexpr int64_t key_elements() const { return int64_t{kPageRows} * head_pitch; }
  constexpr int64_t head_elements() const { return key_elements() + int64_t{kPageRows} * value_pitch; }
  constexpr int64_t page_bytes() const { return kv_heads * head_elements() * element; }

  // Offsets in elements inside a page.
  constexpr int64_t key(int kv_head, int row, int d) const {
    const int per_load = kLoadBytes / element;
    const int64_t chunk = int64_t{row / kKeyBlockRows} * (head_pitch / per_load) + d / per_load;
    return kv_head * head_elements() + (chunk * kKeyBlockRows + row % kKeyBlockRows) * per_load +
           d % per_load;
  }
  constexpr int64_t value(int kv_head, int row, int c) const {
    return kv_head * head_elements() + key_elements() + int64_t{row} * value_pitch + c;
  }
};

constexpr PageLayout MakePageLayout(int element, int kv_heads, int head_dim, int value_dim) {
  return {element,
          kv_heads,
          head_dim,
          value_dim,
          (head_dim + kDimAlign - 1) / kDimAlign * kDimAlign,
          (value_dim + kDimAlign - 1) / kDimAlign * kDimAlign};
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_LAYOUT_H_
