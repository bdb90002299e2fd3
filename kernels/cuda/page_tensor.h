#ifndef EDUBA_KERNELS_CUDA_PAGE_TENSOR_H_
#define EDUBA_KERNELS_CUDA_PAGE_TENSOR_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"

// One KV head of one page against a tile of query vectors on tensor cores: docs/numerics.md section 2.1. For
// keys and values of 16 bits. The partials are those of page_attention.h, and so is all that follows.
//
//   s = low(q) . k + high(q) . k     two 16-bit terms hold 2^-17 of a float (f16: 2^-22); products are exact
//   m, p, l                          fp32, as ever, but for l's order: 4 lanes of keys, then a tree
//   o = low(p) . v + high(p) . v     as s
//
// The error, up to 3e-4, is what the second term of a bf16 query leaves, and what a tensor core cuts off.
//
// A warp takes 16 query vectors, and a block up to 8 warps that share one read of keys and values. Whoever
// else is in the tile, a vector's numbers go through the same products in the same order, as the whole page
// is one fixed sequence: 16 dimensions at a time for all its keys, then 16 keys at a time for all channels.
// Keys that no vector of a warp sees are left out: they would add zeros.
//
// Beyond what page_attention.h asks of a Block, and all of it so that a host can emulate it
// (emulated_block.h):
//   Registers<T> r(block)          r[thread] stays with its thread from phase to phase
//   Warps(f)                       f(warp) for each warp, without a barrier; a warp has
//     Lanes(f)                       f(lane) for each lane
//     Multiply<Type>(operands)       operands(lane) is the lane's part of one product (fragments.h)
//     LoadTransposed(row_of, to)     four matrices of 8 x 8 16-bit elements from shared memory, transposed;
//                                    row_of(lane) is where row lane % 8 of matrix lane / 8 lies, to(lane)
//                                    gets column lane / 4, rows 2 (lane % 4) and the next, of each
//     QuadMax(of), QuadSum(of)       of(lane) is a float&; each gets the result over its 4 neighbours
//   CopyAsync(t, shared, global, is_copied)   16 bytes, or zeros; done when
//   WaitForCopies<n>(t)            returned: all groups of the thread but the n last
//   CommitCopies(t)                ends a group
namespace eduba::cuda {

inline constexpr int kTensorWarpsMax = 8;
inline constexpr int kTensorThreadsMax = kTensorWarpsMax * kWarpThreads;
inline constexpr int kKeyTiles = kPageRows / kTileColumns;  // Tiles of 8 keys.
// Channels multiplied in one pass over the page: with more, a thread had not registers enough.
inline constexpr int kChannels = 64;
inline constexpr int kChannelTiles = kChannels / kTileColumns;
// What comes from memory at a time, a slice: 16 dimensions of all keys, or 64 rows of one pass's channels.
inline constexpr int kValueRows = 64;
inline constexpr int kValueSlices = kPageRows / kValueRows;
// Rows of values are an odd number of 16 bytes apart, so that 8 of them meet in no bank.
inline constexpr int kValueRowBytes = kChannels * 2 + kLoadBytes;
inline constexpr int kSliceBytes = kValueRows * kValueRowBytes;
static_assert(kSliceBytes >= kPageRows * kTileDepth * 2);
inline constexpr int kSlots = 4;  // Slices in shared memory: one in use, three on their way.

// Threads of a block for `tile` query vectors. REQUIRES: a multiple of 16.
constexpr int TensorThreads(int tile) { return tile / kTileRows * kWarpThreads; }

struct TensorShared {
  alignas(16) char slot[kSlots][kSliceBytes];
  int begin[kTensorWarpsMax * kTileRows];  // Visible rows of the page, for each vector.
  int end[kTensorWarpsMax * kTileRows];
  int warp_begin[kTensorWarpsMax];  // Rows that the warp's vectors see lie in here.
  int warp_end[kTensorWarpsMax];
  bool seen[kPageRows];  // Rows that some vector of the tile sees.
};

// One thread's registers. Its two rows are vectors lane / 4 and lane / 4 + 8 of its warp.
struct TensorRegisters {
  float s[kKeyTiles][4];  // Dot products; from then on weights.
  float o[kChannelTiles][4];
  uint32_t high[4];  // The two terms of a query, then of weights.
  uint32_t low[4];
  uint32_t b[2][2];
  float stretch[2];  // A power of two that brings the query into the type's range, and back.
  float shrink[2];
  float m[2];
  float smallest[2];  // The smallest of the dot products, negated.
  float l[2];
  float bad[2];  // 1: something was not finite.
};

// Element `d` of a query, or 0 after its end.
EDUBA_DEVICE float QueryElement(const float* query, int d, int head_dim) {
  return query != nullptr && d < head_dim ? query[d] : 0;
}

// Two neighbours of a fragment in two terms.
template <class Type>
EDUBA_DEVICE void Split(float x, float y, uint32_t& high, uint32_t& low) {
  high = Type::Pack(x, y);
  low = Type::Pack(Sub(x, Type::Low(high)), Sub(y, Type::High(high)));
}

// 16 dimensions of a thread's two queries.
template <class Type>
EDUBA_DEVICE void SplitQuery(const float* const (&query)[2], int first, int head_dim, int lane,
                             TensorRegisters& r) {
  EDUBA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2;
    const int d = first + i / 2 * 8 + lane % 4 * 2;
    float x = QueryElement(query[row], d, head_dim);
    float y = QueryElement(query[row], d + 1, head_dim);
    if constexpr (!Type::kHasFloatRange) {
      x = Mul(x, r.stretch[row]);
      y = Mul(y, r.stretch[row]);
    }
    Split<Type>(x, y, r.high[i], r.low[i]);
  }
}

// 2^k that brings `largest` to [2^14, 2^15), below f16's end; what is 2^39 times smaller is still exact
// enough.
EDUBA_DEVICE int StretchOf(float largest) {
  if (!(largest > 0)) return 0;
  const int k = 14 + 127 - static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23 & 0xff);
  return k < -113 ? -113 : k > 110 ? 110 : k;
}
EDUBA_DEVICE float FloatPowerOfTwo(int k) {
  return std::bit_cast<float>(static_cast<uint32_t>(k + 127) << 23);
}

// f16 holds small numbers badly: its weights, and so their sums, are 2^15 times as large until they leave.
template <class Type>
inline constexpr int kWeightShift = Type::kHasFloatRange ? 0 : 15;
template <class Type>
EDUBA_DEVICE float Unshifted(float sum) {
  return Type::kHasFloatRange ? sum : Mul(sum, 0x1p-15F);
}

inline constexpr float kLog2E = 1.44269504F;

// limit * tanh(u), off by up to 2^-22 of the limit, without a branch: products would be waited for in front
// of one. NaN where u is not finite.
EDUBA_DEVICE float Capped(float u, float limit) {
  const auto bits = std::bit_cast<uint32_t>(u);
  const float e = TwoTo(Mul(std::bit_cast<float>(bits & 0x7fffffffU), -2 * kLog2E));
  const float tanh = Add(Sub(1.0F, DivNearly(Add(e, e), Add(1.0F, e))), Sub(u, u));
  return Mul(limit, std::bit_cast<float>(std::bit_cast<uint32_t>(tanh) | (bits & 0x80000000U)));
}

// From the dot products s of 16 query vectors, all of a page's, to their weights, in place; and m, l, and bad
// where a logit is not finite. The weights are shifted, l is not. `range_of(lane, i)`: keys that the lane's
// vector i sees; others weigh 0, and so do keys that are not in `live` (PageRef::live; null: all are).
// `all_seen`: each vector sees all of them; alike for all lanes, and it changes no bit.
template <class Type, class Warp, class RegistersOf, class RangeOf>
EDUBA_DEVICE void WeighKeys(const Warp& warp, const AttendArgs& args, const RegistersOf& registers_of,
                            const RangeOf& range_of, const uint64_t* live, bool all_seen) {
  const float scale = Mul(args.scale, kLog2E);  // Logits are to the base 2 here.
  const auto factor_of = [&](const auto& r, int i) {
    return Type::kHasFloatRange ? scale : Mul(scale, r.shrink[i]);
  };
  if (args.softcap > 0) {
    warp.Lanes([&](int lane) {
      auto& r = registers_of(lane);
      const float limit = Mul(args.softcap, kLog2E);
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float factor = Div(factor_of(r, i), limit);
        EDUBA_UNROLL
        for (int j = 0; j < kKeyTiles; ++j) {
          EDUBA_UNROLL
          for (int e = 0; e < 2; ++e) {
            r.s[j][2 * i + e] = Capped(Mul(r.s[j][2 * i + e], factor), limit);
          }
        }
      }
    });
  }
  const auto weigh = [&]<bool kAllSeen, bool kMasked>() {
    // of(s, is_seen) for the lane's logits of its vector i.
    const auto for_logits = [&](int lane, int i, const auto& of) {
      auto& r = registers_of(lane);
      const KeyRange seen = range_of(lane, i);
      const auto count = static_cast<uint32_t>(seen.end - seen.begin);
      const int first = lane % 4 * 2 - seen.begin;
      EDUBA_UNROLL
      for (int j = 0; j < kKeyTiles; ++j) {
        EDUBA_UNROLL
        for (int e = 0; e < 2; ++e) {
          bool is_seen = kAllSeen || static_cast<uint32_t>(first + j * kTileColumns + e) < count;
          if constexpr (kMasked) {
            const int key = j * kTileColumns + lane % 4 * 2 + e;
            is_seen = is_seen && (live[key / 64] >> (key % 64) & 1) != 0;
          }
          of(r.s[j][2 * i + e], is_seen);
        }
      }
    };
    EDUBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      // The largest and the smallest dot product: one of them is the largest logit, and where both logits are
      // finite all are, but for NaN, which goes into l.
      warp.Lanes([&](int lane) {
        auto& r = registers_of(lane);
        r.m[i] = -kFloatMax;
        r.smallest[i] = kFloatMax;
        for_logits(lane, i, [&](float s, bool is_seen) {
          r.m[i] = Max(r.m[i], is_seen ? s : -kFloatMax);
          r.smallest[i] = Min(r.smallest[i], is_seen ? s : kFloatMax);
        });
        r.smallest[i] = -r.smallest[i];
      });
      warp.QuadMax([&](int lane) -> float& { return registers_of(lane).m[i]; });
      warp.QuadMax([&](int lane) -> float& { return registers_of(lane).smallest[i]; });
      warp.Lanes([&](int lane) {
        auto& r = registers_of(lane);
        float factor = args.softcap > 0 ? 1 : factor_of(r, i);
        const float x = Mul(r.m[i], factor);
        const float y = Mul(-r.smallest[i], factor);
        r.bad[i] = IsFinite(x) && IsFinite(y) ? 0 : 1;
        r.m[i] = Max(x, y);
        if (!(r.m[i] <= kFusedLogitMax && r.m[i] >= -kFusedLogitMax)) {
          for_logits(lane, i, [&](float& s, bool /*is_seen*/) { s = Mul(s, factor); });
          factor = 1;
        }
        // Fused, so that a logit is rounded once, and after the largest was taken away.
        const float shift = Sub(static_cast<float>(kWeightShift<Type>), r.m[i]);
        r.l[i] = 0;
        for_logits(lane, i, [&](float& s, bool is_seen) {
          float x = Fma(s, factor, shift);
          // Where logits are large the shift is rounded too.
          if constexpr (kWeightShift < Type >> 0) x = MinOrNan(x, kWeightShift<Type> + 0x1p-7F);
          s = is_seen ? TwoTo(x) : 0;
          r.l[i] = Add(r.l[i], s);
        });
      });
      warp.QuadSum([&](int lane) -> float& { return registers_of(lane).l[i]; });
      warp.Lanes([&](int lane) {
        auto& r = registers_of(lane);
        r.l[i] = Unshifted<Type>(r.l[i]);
        r.m[i] = Mul(r.m[i], 0.693147182F);
      });
    }
  };
  if (live != nullptr) {
    weigh.template operator()<false, true>();
  } else if (all_seen) {
    weigh.template operator()<true, false>();
  } else {
    weigh.template operator()<false, false>();
  }
}

// One block's work: a tile of query vectors against one KV head of one page.
template <class Type, class Block>
class TensorPage {
 public:
  using Registers = typename Block::template Registers<TensorRegisters>;

  // All outlive the object; `registers` is the threads' own.
  EDUBA_DEVICE TensorPage(const Block& block, const AttendArgs& args, Registers& registers)
      : block_(block),
        args_(args),
        layout_(args.layout),
        registers_(registers),
        shared_(*reinterpret_cast<TensorShared*>(block.shared())),
        kv_head_(static_cast<int>(block.index() / args.tiles % args.layout.kv_heads)),
        slot_(block.index() / args.tiles / args.layout.kv_heads),
        page_(args.page[slot_]),
        row_heads_(int64_t{args.rows} * args.query_heads),
        first_vector_(static_cast<int>(block.index() % args.tiles) * args.tile),
        vectors_(Smaller(args.rows * args.group - first_vector_, args.tile)),
        warps_(args.tile / kTileRows),
        data_(static_cast<const char*>(page_.data)),
        key_slices_(layout_.head_pitch / kTileDepth),
        passes_((layout_.value_pitch + kChannels - 1) / kChannels),
        slices_(key_slices_ + passes_ * kValueSlices) {}

  EDUBA_DEVICE void Attend() {
    FindSeenRows();
    if (block_begin_ >= block_end_) return KeepNothing();
    for (int slice = 0; slice < kSlots - 1; ++slice) StartSlice(slice);
    PrepareQueries();
    for (int slice = 0; slice < key_slices_; ++slice) {
      NextSlice(slice);
      block_.Warps([&](const auto& warp) { MultiplyKeys(warp, slice); });
    }
    // Every warp weighs the keys by itself: all of the page's are in its registers.
    block_.Warps([&](const auto& warp) {
      WeighKeys<Type>(
          warp, args_, [&](int lane) -> TensorRegisters& { return Of(warp, lane); },
          [&](int lane, int i) {
            const int v = VectorOf(warp, lane, i);
            return KeyRange{shared_.begin[v], shared_.end[v]};
          },
          page_.live, /*all_seen=*/false);
    });
    for (int pass = 0; pass < passes_; ++pass) {
      block_.Warps([&](const auto& warp) { ClearOutputs(warp); });
      EDUBA_UNROLL
      for (int part = 0; part < kValueSlices; ++part) {
        const int slice = key_slices_ + pass * kValueSlices + part;
        NextSlice(slice);
        block_.Warps([&](const auto& warp) { MultiplyValues(warp, slice, part, TilesOf(pass)); });
      }
      block_.Warps([&](const auto& warp) { KeepOutputs(warp, pass); });
    }
    block_.Warps([&](const auto& warp) { KeepSums(warp); });
  }

 private:
  EDUBA_DEVICE static int Smaller(int x, int y) { return x < y ? x : y; }
  // Whether any of rows [from, from + rows) lies in [begin, end).
  EDUBA_DEVICE static bool IsNeeded(int from, int rows, int begin, int end) {
    return from < end && from + rows > begin;
  }

  template <class Warp>
  EDUBA_DEVICE TensorRegisters& Of(const Warp& warp, int lane) {
    return registers_[warp.index() * kWarpThreads + lane];
  }
  // The lane's query vector i, 0 or 1, as the tile numbers it.
  template <class Warp>
  EDUBA_DEVICE static int VectorOf(const Warp& warp, int lane, int i) {
    return warp.index() * kTileRows + lane / 4 + 8 * i;
  }
  EDUBA_DEVICE int RowOf(int v) const { return (first_vector_ + v) / args_.group; }
  EDUBA_DEVICE int64_t RowHeadOf(int v) const {
    return int64_t{RowOf(v)} * args_.query_heads + kv_head_ * args_.group + (first_vector_ + v) % args_.group;
  }
  // Tiles of 8 channels, and units of 16 bytes, of a pass over the values.
  EDUBA_DEVICE int TilesOf(int pass) const {
    return Smaller((layout_.value_pitch - pass * kChannels) / kTileColumns, kChannelTiles);
  }

  // Which rows of the page each vector, each warp, and the block sees.
  EDUBA_DEVICE void FindSeenRows() {
    block_.Threads([&](int t) {
      if (t >= args_.tile) return;
      shared_.begin[t] = shared_.end[t] = 0;
      if (t >= vectors_) return;
      VectorState v;
      SetVisible(args_, RowOf(t), v);
      const KeyRange keys = KeysSeen(v, slot_, page_);
      shared_.begin[t] = keys.begin;
      shared_.end[t] = keys.end;
    });
    block_.Threads([&](int t) {
      for (int row = t; row < kPageRows; row += block_.threads()) {
        bool is_seen = false;
        for (int v = 0; v < vectors_ && !is_seen; ++v) {
          is_seen = row >= shared_.begin[v] && row < shared_.end[v];
        }
        shared_.seen[row] = is_seen && IsLive(page_, row);
      }
      if (t >= warps_) return;
      int begin = kPageRows;
      int end = 0;
      for (int v = t * kTileRows; v < (t + 1) * kTileRows; ++v) {
        if (shared_.begin[v] >= shared_.end[v]) continue;
        begin = shared_.begin[v] < begin ? shared_.begin[v] : begin;
        end = shared_.end[v] > end ? shared_.end[v] : end;
      }
      shared_.warp_begin[t] = begin;
      shared_.warp_end[t] = end;
    });
    for (int w = 0; w < warps_; ++w) {
      block_begin_ = shared_.warp_begin[w] < block_begin_ ? shared_.warp_begin[w] : block_begin_;
      block_end_ = shared_.warp_end[w] > block_end_ ? shared_.warp_end[w] : block_end_;
    }
  }

  EDUBA_DEVICE void KeepNothing() {
    block_.Threads([&](int t) {
      if (t >= vectors_) return;
      args_.m[slot_ * row_heads_ + RowHeadOf(t)] = -Infinity();
      args_.l[slot_ * row_heads_ + RowHeadOf(t)] = 0;
    });
  }

  // Starts the copies of a slice. Keys come in pieces of 32 rows that are as far apart as in the page; those
  // of a piece that nobody sees are not there, those of one that somebody sees may be anything. A row of
  // values that nobody sees counts as zeros, which its weight is as well.
  EDUBA_DEVICE void StartSlice(int slice) {
    block_.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        const int t = warp.index() * kWarpThreads + lane;
        if (slice < key_slices_) {
          CopyKeys(t, slice);
        } else if (slice < slices_) {
          CopyValues(t, slice);
        }
        block_.CommitCopies(t);
      });
    });
  }
  EDUBA_DEVICE void CopyKeys(int t, int slice) {
    char* const to = shared_.slot[slice % kSlots];
    for (int unit = t; unit < kPageRows * 2; unit += block_.threads()) {
      const int piece = unit / (2 * kKeyBlockRows);
      if (!IsNeeded(piece * kKeyBlockRows, kKeyBlockRows, block_begin_, block_end_)) continue;
      const int row = piece * kKeyBlockRows + unit % kKeyBlockRows;
      const int d = slice * kTileDepth + unit / kKeyBlockRows % 2 * 8;
      block_.CopyAsync(t, to + unit * kLoadBytes, data_ + layout_.key(kv_head_, row, d) * 2, true);
    }
  }
  EDUBA_DEVICE void CopyValues(int t, int slice) {
    char* const to = shared_.slot[slice % kSlots];
    const int pass = (slice - key_slices_) / kValueSlices;
    const int first = (slice - key_slices_) % kValueSlices * kValueRows;
    const int units = TilesOf(pass);
    if (!IsNeeded(first, kValueRows, block_begin_, block_end_)) return;
    for (int i = t; i < kValueRows * kChannelTiles; i += block_.threads()) {
      const int row = i / kChannelTiles;
      const int unit = i % kChannelTiles;
      if (unit >= units) continue;
      const int channel = pass * kChannels + unit * kTileColumns;
      block_.CopyAsync(t, to + row * kValueRowBytes + unit * kLoadBytes,
                       data_ + layout_.value(kv_head_, first + row, channel) * 2, shared_.seen[first + row]);
    }
  }
  // Waits for a slice, and lets the next ones come: into the slot of the one before, which all have used.
  EDUBA_DEVICE void NextSlice(int slice) {
    block_.Threads([&](int t) { block_.template WaitForCopies<kSlots - 2>(t); });
    StartSlice(slice + kSlots - 1);
  }

  template <class Warp>
  EDUBA_DEVICE void QueryOf(const Warp& warp, int lane, const float* (&query)[2]) const {
    for (int i = 0; i < 2; ++i) {
      const int v = VectorOf(warp, lane, i);
      query[i] = v < vectors_ ? args_.queries + RowHeadOf(v) * layout_.head_dim : nullptr;
    }
  }
  // Clears the dot products and, for a type of a small range, finds what brings each query into it.
  EDUBA_DEVICE void PrepareQueries() {
    block_.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        TensorRegisters& r = Of(warp, lane);
        EDUBA_UNROLL
        for (int j = 0; j < kKeyTiles; ++j) r.s[j][0] = r.s[j][1] = r.s[j][2] = r.s[j][3] = 0;
        if constexpr (!Type::kHasFloatRange) FindLargest(warp, lane);
      });
      if constexpr (!Type::kHasFloatRange) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          warp.QuadMax([&](int lane) -> float& { return Of(warp, lane).m[i]; });
          warp.Lanes([&](int lane) {
            TensorRegisters& r = Of(warp, lane);
            const int k = StretchOf(r.m[i]);
            r.stretch[i] = FloatPowerOfTwo(k);
            r.shrink[i] = FloatPowerOfTwo(-k);
          });
        }
      }
    });
  }
  // The largest element, in magnitude, of the lane's share of its two queries.
  template <class Warp>
  EDUBA_DEVICE void FindLargest(const Warp& warp, int lane) {
    TensorRegisters& r = Of(warp, lane);
    const float* query[2];
    QueryOf(warp, lane, query);
    for (int i = 0; i < 2; ++i) {
      r.m[i] = 0;
      for (int d = lane % 4; d < layout_.head_dim; d += 4) {
        const float x = QueryElement(query[i], d, layout_.head_dim);
        const float size = x < 0 ? -x : x;
        r.m[i] = size > r.m[i] ? size : r.m[i];
      }
    }
  }

  // Adds 16 dimensions to the warp's dot products with all keys that it sees.
  template <class Warp>
  EDUBA_DEVICE void MultiplyKeys(const Warp& warp, int slice) {
    const int begin = shared_.warp_begin[warp.index()];
    const int end = shared_.warp_end[warp.index()];
    if (begin >= end) return;
    warp.Lanes([&](int lane) {
      const float* query[2];
      QueryOf(warp, lane, query);
      SplitQuery<Type>(query, slice * kTileDepth, layout_.head_dim, lane, Of(warp, lane));
    });
    const char* const keys = shared_.slot[slice % kSlots];
    EDUBA_UNROLL
    for (int piece = 0; piece < kPageRows / kKeyBlockRows; ++piece) {
      if (!IsNeeded(piece * kKeyBlockRows, kKeyBlockRows, begin, end)) continue;
      EDUBA_UNROLL
      for (int i = 0; i < kKeyBlockRows / kTileColumns; ++i) {
        const int j = piece * (kKeyBlockRows / kTileColumns) + i;
        // 8 keys of 8 dimensions are 128 consecutive bytes, in the order of lanes.
        warp.Lanes([&](int lane) {
          EDUBA_UNROLL
          for (int half = 0; half < 2; ++half) {
            Of(warp, lane).b[0][half] =
                *reinterpret_cast<const uint32_t*>(keys + (piece * 2 + half) * (kKeyBlockRows * kLoadBytes) +
                                                   i * (kTileColumns * kLoadBytes) + lane * 4);
          }
        });
        warp.template Multiply<Type>([&](int lane) {
          TensorRegisters& r = Of(warp, lane);
          return MatrixOperands{r.s[j], r.low, r.b[0]};
        });
        warp.template Multiply<Type>([&](int lane) {
          TensorRegisters& r = Of(warp, lane);
          return MatrixOperands{r.s[j], r.high, r.b[0]};
        });
      }
    }
  }

  template <class Warp>
  EDUBA_DEVICE void ClearOutputs(const Warp& warp) {
    warp.Lanes([&](int lane) {
      TensorRegisters& r = Of(warp, lane);
      EDUBA_UNROLL
      for (int n = 0; n < kChannelTiles; ++n) r.o[n][0] = r.o[n][1] = r.o[n][2] = r.o[n][3] = 0;
    });
  }
  // Adds the weighted values of one slice: part `part` of the rows, `tiles` tiles of channels.
  template <class Warp>
  EDUBA_DEVICE void MultiplyValues(const Warp& warp, int slice, int part, int tiles) {
    const int begin = shared_.warp_begin[warp.index()];
    const int end = shared_.warp_end[warp.index()];
    EDUBA_UNROLL
    for (int i = 0; i < kValueRows / kTileDepth; ++i) {
      const int step = part * (kValueRows / kTileDepth) + i;
      if (!IsNeeded(step * kTileDepth, kTileDepth, begin, end)) continue;
      const char* const values = shared_.slot[slice % kSlots] + i * kTileDepth * kValueRowBytes;
      // Two tiles of 8 keys as c are one of 16 keys as a.
      warp.Lanes([&](int lane) {
        TensorRegisters& r = Of(warp, lane);
        EDUBA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float(&p)[4] = r.s[2 * step + j / 2];
          Split<Type>(p[j % 2 * 2], p[j % 2 * 2 + 1], r.high[j], r.low[j]);
        }
      });
      EDUBA_UNROLL
      for (int n = 0; n < kChannelTiles; n += 2) {
        if (n < tiles) MultiplyTwoTiles(warp, values, n);
      }
    }
  }
  // Channel tiles n and n + 1 of 16 rows of values.
  template <class Warp>
  EDUBA_DEVICE void MultiplyTwoTiles(const Warp& warp, const char* values, int n) {
    warp.LoadTransposed(
        [&](int lane) { return values + lane % 16 * kValueRowBytes + (n + lane / 16) * kLoadBytes; },
        [&](int lane) -> uint32_t(&)[2][2] { return Of(warp, lane).b; });
    EDUBA_UNROLL
    for (int k = 0; k < 2; ++k) {
      warp.template Multiply<Type>([&](int lane) {
        TensorRegisters& r = Of(warp, lane);
        return MatrixOperands{r.o[n + k], r.low, r.b[k]};
      });
      warp.template Multiply<Type>([&](int lane) {
        TensorRegisters& r = Of(warp, lane);
        return MatrixOperands{r.o[n + k], r.high, r.b[k]};
      });
    }
  }

  template <class Warp>
  EDUBA_DEVICE void KeepOutputs(const Warp& warp, int pass) {
    warp.Lanes([&](int lane) {
      TensorRegisters& r = Of(warp, lane);
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int v = VectorOf(warp, lane, i);
        if (shared_.begin[v] >= shared_.end[v]) continue;
        float* const to = args_.o + (slot_ * row_heads_ + RowHeadOf(v)) * layout_.value_pitch +
                          pass * kChannels + lane % 4 * 2;
        EDUBA_UNROLL
        for (int n = 0; n < kChannelTiles; ++n) {
          if (n >= TilesOf(pass)) continue;
          const float x = Unshifted<Type>(r.o[n][2 * i]);
          const float y = Unshifted<Type>(r.o[n][2 * i + 1]);
          if (!IsFinite(x) || !IsFinite(y)) r.bad[i] = 1;
          StorePair(to + n * kTileColumns, x, y);
        }
      }
    });
  }
  template <class Warp>
  EDUBA_DEVICE void KeepSums(const Warp& warp) {
    EDUBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      warp.QuadMax([&](int lane) -> float& { return Of(warp, lane).bad[i]; });
      warp.Lanes([&](int lane) {
        const TensorRegisters& r = Of(warp, lane);
        const int v = VectorOf(warp, lane, i);
        if (lane % 4 != 0 || v >= vectors_) return;
        KeepTotals(args_, slot_, page_.index, RowHeadOf(v), shared_.begin[v] < shared_.end[v],
                   r.bad[i] == 0 && IsFinite(r.l[i]), r.m[i], r.l[i]);
      });
    }
  }

  const Block& block_;
  const AttendArgs& args_;
  const PageLayout& layout_;
  Registers& registers_;
  TensorShared& shared_;
  const int kv_head_;
  const int64_t slot_;  // The page's place among the step's pages.
  const PageEntry page_;
  const int64_t row_heads_;
  const int first_vector_;  // The tile's, among the KV head's.
  const int vectors_;       // The tile's vectors.
  const int warps_;
  const char* const data_;
  const int key_slices_;
  const int passes_;
  const int slices_;
  // Rows that some vector of the block sees lie in [block_begin_, block_end_).
  int block_begin_ = kPageRows;
  int block_end_ = 0;
};

template <class Type, class Block>
EDUBA_DEVICE void AttendPageTensor(const Block& block, const AttendArgs& args) {
  static_assert(Type::kElement == 2);
  typename Block::template Registers<TensorRegisters> registers(block);
  TensorPage<Type, Block>(block, args, registers).Attend();
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_TENSOR_H_
