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
// Beyond what page_attention.h asks of a Block, and all of it so that a host can play it (emulated_block.h):
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
inline constexpr int kKeyTiles = kPageRows / kTileColumns;  // Of 8 keys.
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

// Of a thread. Its two rows are vectors lane / 4 and lane / 4 + 8 of its warp.
struct TensorRegisters {
  float s[kKeyTiles][4];  // Dot products; from then on weights.
  float o[kChannelTiles][4];
  uint32_t high[4];  // The two terms of a query, then of weights.
  uint32_t low[4];
  uint32_t b[2][2];
  float stretch[2];  // A power of two that brings the query into the type's range, and back.
  float shrink[2];
  float m[2];
  float smallest[2];  // Of the dot products, negated.
  float l[2];
  float bad[2];  // 1: something was not finite.
};

// Element `d` of a query, or 0 behind its end.
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
          // Of large logits the shift is rounded too.
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

template <class Type, class Block>
EDUBA_DEVICE void AttendPageTensor(const Block& block, const AttendArgs& args) {
  static_assert(Type::kElement == 2);
  const PageLayout& layout = args.layout;
  auto& shared = *reinterpret_cast<TensorShared*>(block.shared());
  typename Block::template Registers<TensorRegisters> registers(block);

  const int tile = static_cast<int>(block.index() % args.tiles);
  const int kv_head = static_cast<int>(block.index() / args.tiles % layout.kv_heads);
  const int64_t slot = block.index() / args.tiles / layout.kv_heads;
  const PageEntry page = args.page[slot];
  const int64_t row_heads = int64_t{args.rows} * args.query_heads;
  const int first_vector = tile * args.tile;
  const int left = args.rows * args.group - first_vector;
  const int vectors = left < args.tile ? left : args.tile;
  const int warps = args.tile / kTileRows;
  const auto row_of = [&](int v) { return (first_vector + v) / args.group; };
  const auto row_head_of = [&](int v) {
    return int64_t{row_of(v)} * args.query_heads + kv_head * args.group + (first_vector + v) % args.group;
  };
  block.Threads([&](int t) {
    if (t >= args.tile) return;
    shared.begin[t] = shared.end[t] = 0;
    if (t >= vectors) return;
    VectorState v;
    SetVisible(args, row_of(t), v);
    const KeyRange keys = KeysSeen(v, slot, page);
    shared.begin[t] = keys.begin;
    shared.end[t] = keys.end;
  });
  block.Threads([&](int t) {
    for (int row = t; row < kPageRows; row += block.threads()) {
      bool is_seen = false;
      for (int v = 0; v < vectors && !is_seen; ++v) is_seen = row >= shared.begin[v] && row < shared.end[v];
      shared.seen[row] = is_seen && IsLive(page, row);
    }
    if (t >= warps) return;
    int begin = kPageRows;
    int end = 0;
    for (int v = t * kTileRows; v < (t + 1) * kTileRows; ++v) {
      if (shared.begin[v] >= shared.end[v]) continue;
      begin = shared.begin[v] < begin ? shared.begin[v] : begin;
      end = shared.end[v] > end ? shared.end[v] : end;
    }
    shared.warp_begin[t] = begin;
    shared.warp_end[t] = end;
  });
  int block_begin = kPageRows;
  int block_end = 0;
  for (int w = 0; w < warps; ++w) {
    block_begin = shared.warp_begin[w] < block_begin ? shared.warp_begin[w] : block_begin;
    block_end = shared.warp_end[w] > block_end ? shared.warp_end[w] : block_end;
  }
  if (block_begin >= block_end) {
    block.Threads([&](int t) {
      if (t >= vectors) return;
      args.m[slot * row_heads + row_head_of(t)] = -Infinity();
      args.l[slot * row_heads + row_head_of(t)] = 0;
    });
    return;
  }

  const char* const data = static_cast<const char*>(page.data);
  const int key_slices = layout.head_pitch / kTileDepth;
  const int passes = (layout.value_pitch + kChannels - 1) / kChannels;
  const int slices = key_slices + passes * kValueSlices;
  // Tiles of 8 channels, and units of 16 bytes.
  const auto tiles_of = [&](int pass) {
    const int tiles = (layout.value_pitch - pass * kChannels) / kTileColumns;
    return tiles < kChannelTiles ? tiles : kChannelTiles;
  };
  const auto is_needed = [](int from, int rows, int begin, int end) {
    return from < end && from + rows > begin;
  };
  // Starts the copies of a slice. Keys come in pieces of 32 rows that are as far apart as in the page; those
  // of a piece that nobody sees are not there, those of one that somebody sees may be anything. A row of
  // values that nobody sees counts as zeros, which its weight is as well.
  const auto start = [&](int slice) {
    block.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        const int t = warp.index() * kWarpThreads + lane;
        char* const to = shared.slot[slice % kSlots];
        if (slice < key_slices) {
          for (int unit = t; unit < kPageRows * 2; unit += block.threads()) {
            const int piece = unit / (2 * kKeyBlockRows);
            if (!is_needed(piece * kKeyBlockRows, kKeyBlockRows, block_begin, block_end)) continue;
            const int row = piece * kKeyBlockRows + unit % kKeyBlockRows;
            const int d = slice * kTileDepth + unit / kKeyBlockRows % 2 * 8;
            block.CopyAsync(t, to + unit * kLoadBytes, data + layout.key(kv_head, row, d) * 2, true);
          }
        } else if (slice < slices) {
          const int pass = (slice - key_slices) / kValueSlices;
          const int first = (slice - key_slices) % kValueSlices * kValueRows;
          const int units = tiles_of(pass);
          if (is_needed(first, kValueRows, block_begin, block_end)) {
            for (int i = t; i < kValueRows * kChannelTiles; i += block.threads()) {
              const int row = i / kChannelTiles;
              const int unit = i % kChannelTiles;
              if (unit >= units) continue;
              const int channel = pass * kChannels + unit * kTileColumns;
              block.CopyAsync(t, to + row * kValueRowBytes + unit * kLoadBytes,
                              data + layout.value(kv_head, first + row, channel) * 2,
                              shared.seen[first + row]);
            }
          }
        }
        block.CommitCopies(t);
      });
    });
  };
  // Waits for a slice, and lets the next ones come: into the slot of the one before, which all have used.
  const auto next = [&](int slice) {
    block.Threads([&](int t) { block.template WaitForCopies<kSlots - 2>(t); });
    start(slice + kSlots - 1);
  };
  for (int slice = 0; slice < kSlots - 1; ++slice) start(slice);

  const auto query_of = [&](int warp, int lane, const float*(&query)[2]) {
    for (int i = 0; i < 2; ++i) {
      const int v = warp * kTileRows + lane / 4 + 8 * i;
      query[i] = v < vectors ? args.queries + row_head_of(v) * layout.head_dim : nullptr;
    }
  };
  block.Warps([&](const auto& warp) {
    warp.Lanes([&](int lane) {
      TensorRegisters& r = registers[warp.index() * kWarpThreads + lane];
      EDUBA_UNROLL
      for (int j = 0; j < kKeyTiles; ++j) r.s[j][0] = r.s[j][1] = r.s[j][2] = r.s[j][3] = 0;
      if constexpr (!Type::kHasFloatRange) {
        const float* query[2];
        query_of(warp.index(), lane, query);
        for (int i = 0; i < 2; ++i) {
          r.m[i] = 0;
          for (int d = lane % 4; d < layout.head_dim; d += 4) {
            const float x = QueryElement(query[i], d, layout.head_dim);
            const float size = x < 0 ? -x : x;
            r.m[i] = size > r.m[i] ? size : r.m[i];
          }
        }
      }
    });
    if constexpr (!Type::kHasFloatRange) {
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) {
        warp.QuadMax([&](int lane) -> float& { return registers[warp.index() * kWarpThreads + lane].m[i]; });
        warp.Lanes([&](int lane) {
          TensorRegisters& r = registers[warp.index() * kWarpThreads + lane];
          const int k = StretchOf(r.m[i]);
          r.stretch[i] = FloatPowerOfTwo(k);
          r.shrink[i] = FloatPowerOfTwo(-k);
        });
      }
    }
  });

  for (int slice = 0; slice < key_slices; ++slice) {
    next(slice);
    block.Warps([&](const auto& warp) {
      const int first_thread = warp.index() * kWarpThreads;
      const int begin = shared.warp_begin[warp.index()];
      const int end = shared.warp_end[warp.index()];
      if (begin >= end) return;
      warp.Lanes([&](int lane) {
        const float* query[2];
        query_of(warp.index(), lane, query);
        SplitQuery<Type>(query, slice * kTileDepth, layout.head_dim, lane, registers[first_thread + lane]);
      });
      const char* const keys = shared.slot[slice % kSlots];
      EDUBA_UNROLL
      for (int piece = 0; piece < kPageRows / kKeyBlockRows; ++piece) {
        if (!is_needed(piece * kKeyBlockRows, kKeyBlockRows, begin, end)) continue;
        EDUBA_UNROLL
        for (int i = 0; i < kKeyBlockRows / kTileColumns; ++i) {
          const int j = piece * (kKeyBlockRows / kTileColumns) + i;
          // 8 keys of 8 dimensions are 128 consecutive bytes, in the order of lanes.
          warp.Lanes([&](int lane) {
            EDUBA_UNROLL
            for (int half = 0; half < 2; ++half) {
              registers[first_thread + lane].b[0][half] = *reinterpret_cast<const uint32_t*>(
                  keys + (piece * 2 + half) * (kKeyBlockRows * kLoadBytes) + i * (kTileColumns * kLoadBytes) +
                  lane * 4);
            }
          });
          warp.template Multiply<Type>([&](int lane) {
            TensorRegisters& r = registers[first_thread + lane];
            return MatrixOperands{r.s[j], r.low, r.b[0]};
          });
          warp.template Multiply<Type>([&](int lane) {
            TensorRegisters& r = registers[first_thread + lane];
            return MatrixOperands{r.s[j], r.high, r.b[0]};
          });
        }
      }
    });
  }

  // Of the page, so of every warp by itself.
  block.Warps([&](const auto& warp) {
    WeighKeys<Type>(
        warp, args,
        [&](int lane) -> TensorRegisters& { return registers[warp.index() * kWarpThreads + lane]; },
        [&](int lane, int i) {
          const int v = warp.index() * kTileRows + lane / 4 + 8 * i;
          return KeyRange{shared.begin[v], shared.end[v]};
        },
        page.live, /*all_seen=*/false);
  });

  for (int pass = 0; pass < passes; ++pass) {
    const int tiles = tiles_of(pass);
    block.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        TensorRegisters& r = registers[warp.index() * kWarpThreads + lane];
        EDUBA_UNROLL
        for (int n = 0; n < kChannelTiles; ++n) r.o[n][0] = r.o[n][1] = r.o[n][2] = r.o[n][3] = 0;
      });
    });
    EDUBA_UNROLL
    for (int part = 0; part < kValueSlices; ++part) {
      const int slice = key_slices + pass * kValueSlices + part;
      next(slice);
      block.Warps([&](const auto& warp) {
        const int first_thread = warp.index() * kWarpThreads;
        const int begin = shared.warp_begin[warp.index()];
        const int end = shared.warp_end[warp.index()];
        EDUBA_UNROLL
        for (int i = 0; i < kValueRows / kTileDepth; ++i) {
          const int step = part * (kValueRows / kTileDepth) + i;
          if (!is_needed(step * kTileDepth, kTileDepth, begin, end)) continue;
          const char* const values = shared.slot[slice % kSlots] + i * kTileDepth * kValueRowBytes;
          // Two tiles of 8 keys as c are one of 16 keys as a.
          warp.Lanes([&](int lane) {
            TensorRegisters& r = registers[first_thread + lane];
            EDUBA_UNROLL
            for (int j = 0; j < 4; ++j) {
              const float(&p)[4] = r.s[2 * step + j / 2];
              Split<Type>(p[j % 2 * 2], p[j % 2 * 2 + 1], r.high[j], r.low[j]);
            }
          });
          EDUBA_UNROLL
          for (int n = 0; n < kChannelTiles; n += 2) {
            if (n >= tiles) continue;
            warp.LoadTransposed(
                [&](int lane) { return values + lane % 16 * kValueRowBytes + (n + lane / 16) * kLoadBytes; },
                [&](int lane) -> uint32_t(&)[2][2] { return registers[first_thread + lane].b; });
            EDUBA_UNROLL
            for (int k = 0; k < 2; ++k) {
              warp.template Multiply<Type>([&](int lane) {
                TensorRegisters& r = registers[first_thread + lane];
                return MatrixOperands{r.o[n + k], r.low, r.b[k]};
              });
              warp.template Multiply<Type>([&](int lane) {
                TensorRegisters& r = registers[first_thread + lane];
                return MatrixOperands{r.o[n + k], r.high, r.b[k]};
              });
            }
          }
        }
      });
    }
    block.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        TensorRegisters& r = registers[warp.index() * kWarpThreads + lane];
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int v = warp.index() * kTileRows + lane / 4 + 8 * i;
          if (shared.begin[v] >= shared.end[v]) continue;
          float* const to = args.o + (slot * row_heads + row_head_of(v)) * layout.value_pitch +
                            pass * kChannels + lane % 4 * 2;
          EDUBA_UNROLL
          for (int n = 0; n < kChannelTiles; ++n) {
            if (n >= tiles) continue;
            const float x = Unshifted<Type>(r.o[n][2 * i]);
            const float y = Unshifted<Type>(r.o[n][2 * i + 1]);
            if (!IsFinite(x) || !IsFinite(y)) r.bad[i] = 1;
            StorePair(to + n * kTileColumns, x, y);
          }
        }
      });
    });
  }

  block.Warps([&](const auto& warp) {
    EDUBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      warp.QuadMax([&](int lane) -> float& { return registers[warp.index() * kWarpThreads + lane].bad[i]; });
      warp.Lanes([&](int lane) {
        const TensorRegisters& r = registers[warp.index() * kWarpThreads + lane];
        const int v = warp.index() * kTileRows + lane / 4 + 8 * i;
        if (lane % 4 != 0 || v >= vectors) return;
        KeepTotals(args, slot, page.index, row_head_of(v), shared.begin[v] < shared.end[v],
                   r.bad[i] == 0 && IsFinite(r.l[i]), r.m[i], r.l[i]);
      });
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_TENSOR_H_
