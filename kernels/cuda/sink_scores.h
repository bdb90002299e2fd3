#ifndef EDUBA_KERNELS_CUDA_SINK_SCORES_H_
#define EDUBA_KERNELS_CUDA_SINK_SCORES_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/portable_math.h"

// The logits of token sinks, and each row and head's reference M, in double and in the order of
// kernels/merging_step.cc, so to the same bits. The step's first kernel: it also clears the sums. See
// page_attention.h for what a Block is.
namespace eduba::cuda {

inline constexpr int kSinkThreads = 128;

struct SinkArgs {
  PageLayout layout;
  float scale;
  float softcap;
  int rows;
  int query_heads;
  int group;
  int width;                // Threads of a row and head: a power of two, kSinkThreads at most.
  int64_t tokens;           // Token sinks that some row sees.
  const float* queries;     // [rows, query_heads, head_dim]
  const int32_t* visible;   // [rows]: token sinks that a row sees. Not read without token sinks.
  const float* learned;     // [query_heads], or null
  const PageEntry* page;    // [ceil(tokens / 256)]
  double* logits;           // [rows * query_heads, tokens]; set where seen
  double* reference;        // [rows * query_heads]: M, the largest; -inf without a sink
  uint32_t* has_bad_sinks;  // Set to 1 where a token sink's key or value is not finite.
  uint64_t* words;          // [rows * query_heads, value_dim + 2]: zeroed; or null

  constexpr int64_t row_heads() const { return int64_t{rows} * query_heads; }
  constexpr int row_heads_of_block() const { return kSinkThreads / width; }
  constexpr int64_t blocks() const { return (row_heads() + row_heads_of_block() - 1) / row_heads_of_block(); }
};

// The threads for each row and head that suit so many sinks.
constexpr int SinkWidth(int64_t tokens) {
  int width = 1;
  while (width < tokens && width < kSinkThreads) width *= 2;
  return width;
}

struct SinkShared {
  double largest[kSinkThreads];
};

template <class Type, class Block>
EDUBA_DEVICE void ScoreSinks(const Block& block, const SinkArgs& args) {
  using Stored = typename Type::Stored;
  auto& shared = *reinterpret_cast<SinkShared*>(block.shared());
  const PageLayout& layout = args.layout;
  const int64_t first = block.index() * args.row_heads_of_block();

  block.Threads([&](int t) {
    const int64_t row_head = first + t / args.width;
    double largest = -static_cast<double>(Infinity());
    if (row_head < args.row_heads() && args.tokens > 0) {
      const int kv_head = static_cast<int>(row_head % args.query_heads) / args.group;
      const float* const query = args.queries + row_head * layout.head_dim;
      const int64_t seen = args.visible[row_head / args.query_heads];
      for (int64_t token = t % args.width; token < seen; token += args.width) {
        const auto* const page = static_cast<const Stored*>(args.page[token / kPageRows].data);
        const auto row = static_cast<int>(token % kPageRows);
        // A product of two floats is exact in double, so fusing it with the sum changes nothing.
        double dot = 0;
        for (int d = 0; d < layout.head_dim; ++d) {
          dot = Fma(static_cast<double>(query[d]),
                    static_cast<double>(Type::Value(page[layout.key(kv_head, row, d)])), dot);
        }
        double logit = Mul(static_cast<double>(args.scale), dot);
        if (args.softcap > 0) {
          const auto cap = static_cast<double>(args.softcap);
          logit = Mul(cap, PortableTanh(Div(logit, cap)));
        }
        args.logits[row_head * args.tokens + token] = logit;
        largest = logit > largest ? logit : largest;
      }
    }
    shared.largest[t] = largest;

    // What all blocks share out among their threads.
    const int64_t stride = args.blocks() * kSinkThreads;
    const int64_t mine = block.index() * kSinkThreads + t;
    const int width = layout.head_dim + layout.value_dim;
    for (int64_t i = mine; i < args.tokens * layout.kv_heads * width; i += stride) {
      const int column = static_cast<int>(i % width);
      const int kv_head = static_cast<int>(i / width % layout.kv_heads);
      const int64_t token = i / width / layout.kv_heads;
      const auto* const page = static_cast<const Stored*>(args.page[token / kPageRows].data);
      const auto row = static_cast<int>(token % kPageRows);
      const int64_t at = column < layout.head_dim ? layout.key(kv_head, row, column)
                                                  : layout.value(kv_head, row, column - layout.head_dim);
      if (!IsFinite(Type::Value(page[at]))) *args.has_bad_sinks = 1;  // Whoever writes it writes the same.
    }
    if (args.words != nullptr) {
      const int64_t words = args.row_heads() * (layout.value_dim + 2);
      for (int64_t i = mine; i < words; i += stride) args.words[i] = 0;
    }
  });

  block.Threads([&](int t) {
    const int64_t row_head = first + t / args.width;
    if (t % args.width != 0 || row_head >= args.row_heads()) return;
    double largest = args.learned == nullptr ? -static_cast<double>(Infinity())
                                             : static_cast<double>(args.learned[row_head % args.query_heads]);
    for (int i = t; i < t + args.width; ++i) {
      largest = shared.largest[i] > largest ? shared.largest[i] : largest;
    }
    args.reference[row_head] = largest;
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_SINK_SCORES_H_
