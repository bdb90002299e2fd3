#ifndef EDUBA_KERNELS_CUDA_PAGE_ROWS_H_
#define EDUBA_KERNELS_CUDA_PAGE_ROWS_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"

// Rows into pages, one element for each thread. See page_attention.h for what a Block is.
namespace eduba::cuda {

inline constexpr int kRowThreads = 256;

// Writes rows [row, row + rows) of a page, padding included.
struct WriteArgs {
  PageLayout layout;
  void* page;
  int row;
  int rows;
  const void* keys;    // [rows, kv_heads, head_dim], elements as stored
  const void* values;  // [rows, kv_heads, value_dim]

  constexpr int64_t elements() const {
    return int64_t{rows} * layout.kv_heads * (layout.head_pitch + layout.value_pitch);
  }
  constexpr int64_t blocks() const { return (elements() + kRowThreads - 1) / kRowThreads; }
};

template <class Stored, class Block>
EDUBA_DEVICE void WriteRows(const Block& block, const WriteArgs& args) {
  const PageLayout& layout = args.layout;
  block.Threads([&](int t) {
    const int64_t i = block.index() * kRowThreads + t;
    if (i >= args.elements()) return;
    const int width = layout.head_pitch + layout.value_pitch;
    const int column = static_cast<int>(i % width);
    const int kv_head = static_cast<int>(i / width % layout.kv_heads);
    const auto row = static_cast<int>(i / width / layout.kv_heads);
    const int64_t from = int64_t{row} * layout.kv_heads + kv_head;
    auto* page = static_cast<Stored*>(args.page);
    if (column < layout.head_pitch) {
      const auto* keys = static_cast<const Stored*>(args.keys);
      page[layout.key(kv_head, args.row + row, column)] =
          column < layout.head_dim ? keys[from * layout.head_dim + column] : Stored{0};
    } else {
      const int c = column - layout.head_pitch;
      const auto* values = static_cast<const Stored*>(args.values);
      page[layout.value(kv_head, args.row + row, c)] =
          c < layout.value_dim ? values[from * layout.value_dim + c] : Stored{0};
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_ROWS_H_
