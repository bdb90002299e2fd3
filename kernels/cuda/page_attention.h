#ifndef EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_
#define EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_layout.h"

// One KV head of one page against a tile of query vectors, by one block of threads: docs/numerics.md section
// 2, in the order of kernels/cpu, so to the same bits.
//
// The code is written once for the device and for a host that plays it (emulated_device.h). A Block runs
// phases: Threads(f) calls f(thread) for every thread of the block and waits for all of them, and nothing
// passes between threads but through shared memory from one phase to the next. Every branch around a phase
// depends on what all threads of the block see alike.
namespace eduba::cuda {

inline constexpr int kAttendThreads = 256;  // One for each key of a page.
inline constexpr int kMaxTile = 8;          // Query vectors that share one read of keys and values.

// Rows of shared scores are so far apart that threads of neighbouring query vectors meet in no bank.
inline constexpr int kScorePitch = kPageRows + 16;
inline constexpr int kSumLanes = 16;    // Virtual lanes of the sum of weights.
inline constexpr int kRowSegment = 64;  // Rows of values summed from zero before they join the total.
inline constexpr int kSegments = kPageRows / kRowSegment;
inline constexpr int kGroupRows = 16;  // Rows of values loaded before they are used.
inline constexpr int kUnitDims = 8;    // Dimensions of a key loaded and multiplied at a time.
inline constexpr int kUnitsAhead = 4;  // Of them, loaded before they are used.
static_assert(kPageRows == kAttendThreads && kPageRows / kGroupRows == 16);

struct PageEntry {
  const void* data;
  int64_t index;
};

struct AttendArgs {
  PageLayout layout;
  float scale;
  float softcap;
  int dot_segment;  // Dimensions summed from zero: 8 or 16 (kernels/cpu/page_kernels.cc).
  int dot_group;    // Dimensions added up in one float: one segment, or two.
  int rows;
  int query_heads;
  int group;
  int tile;   // Query vectors of a block: 1, 2, 4 or 8; of page_tensor.h, up to 8 times 16.
  int tiles;  // ceil(rows * group / tile)
  int64_t pages;
  const float* queries;          // [rows, query_heads, head_dim]
  const PositionRange* visible;  // [rows]
  const PageEntry* page;         // [pages]
  float* m;                      // [pages, rows * query_heads]; -inf: sees nothing, +inf: a fault
  float* l;                      // As m.
  float* o;                      // [pages, rows * query_heads, value_pitch]; not set where m is infinite
  uint32_t* maxima;              // [rows * query_heads]: OrderOf the largest m; 0 at the start
  uint64_t* fault;               // FaultKey of the lowest page and row head; 0 at the start

  constexpr int64_t blocks() const { return pages * layout.kv_heads * tiles; }
};

// Larger for lower pages, and for lower row heads of a page; never 0.
EDUBA_DEVICE uint64_t FaultKey(int64_t page, int64_t row_head) {
  return ~((static_cast<uint64_t>(page) << 32) | static_cast<uint64_t>(row_head));
}

// Keeps m and l of one query vector's partial, and tells the step what it has to know of it. `sees_keys`: of
// this page; `good`: all of its arithmetic was finite.
EDUBA_DEVICE void KeepTotals(const AttendArgs& args, int64_t slot, int64_t page, int64_t row_head,
                             bool sees_keys, bool good, float m, float l) {
  float largest = -Infinity();
  float sum = 0;
  if (sees_keys) {
    largest = good ? m : Infinity();
    sum = good ? l : 0;
    AtomicMax(&args.maxima[row_head], OrderOf(largest));
    if (!good) AtomicMax(args.fault, FaultKey(page, row_head));
  }
  const int64_t place = slot * args.rows * args.query_heads + row_head;
  args.m[place] = largest;
  args.l[place] = sum;
}

// What a block keeps in shared memory, in floats from its start.
struct AttendShared {
  int query;    // [tile, head_pitch]
  int high;     // [tile, kScorePitch]: dot products, or capped logits
  int low;      // [tile, kScorePitch]: what their rounding left
  int segment;  // [tile, kSegments, value_pitch]; over the three above, when they are not needed any more
  int weight;   // [256, tile]
  int lane;     // [kSumLanes, tile]
  int m;        // [tile]
  int l;        // [tile]
  int finite;   // [tile] int
  int begin;    // [tile] int: visible rows of the page
  int end;      // [tile] int
  int seen;     // [16] bits of the 16 rows of a group that some query vector sees
  int floats;   // In all.
};
constexpr AttendShared MakeAttendShared(int tile, int head_pitch, int value_pitch) {
  AttendShared s = {};
  s.query = 0;
  s.high = tile * head_pitch;
  s.low = s.high + tile * kScorePitch;
  const int first = s.low + tile * kScorePitch;
  s.segment = 0;
  const int second = tile * kSegments * value_pitch;
  s.weight = first > second ? first : second;  // Both are multiples of 16.
  s.lane = s.weight + kPageRows * tile;
  s.m = s.lane + kSumLanes * tile;
  s.l = s.m + tile;
  s.finite = s.l + tile;
  s.begin = s.finite + tile;
  s.end = s.begin + tile;
  s.seen = s.end + tile;
  s.floats = s.seen + 16;
  return s;
}

// 8 elements of one key.
template <class Type>
struct KeyUnit {
  Load16 load[kUnitDims * Type::kElement / kLoadBytes];
};
template <class Type>
EDUBA_DEVICE KeyUnit<Type> LoadKeyUnit(const char* from) {
  KeyUnit<Type> unit;
  EDUBA_UNROLL
  for (int i = 0; i < kUnitDims * Type::kElement / kLoadBytes; ++i) {
    unit.load[i] = LoadConstant16(from + int64_t{i} * kKeyBlockRows * kLoadBytes);
  }
  return unit;
}
template <class Type>
EDUBA_DEVICE void Unpack(const KeyUnit<Type>& unit, float (&key)[kUnitDims]) {
  EDUBA_UNROLL
  for (int i = 0; i < kUnitDims; ++i) {
    if constexpr (Type::kElement == 4) {
      key[i] = Type::Value(unit.load[i / 4].word[i % 4]);
    } else {
      const uint32_t word = unit.load[0].word[i / 2];
      key[i] = i % 2 == 0 ? Type::Low(word) : Type::High(word);
    }
  }
}

// Dot products of one key with kTile query vectors, as two numbers each: high, and what its rounding left.
template <class Type, int kTile>
EDUBA_DEVICE void DotKey(const AttendArgs& args, const char* key, const float* queries, float (&high)[kTile],
                         float (&low)[kTile]) {
  const int units = args.layout.head_pitch / kUnitDims;
  const int pitch = args.layout.head_pitch;
  // Bytes from 8 dimensions of a key to the next 8.
  constexpr int64_t kUnitStride = int64_t{kUnitDims} * Type::kElement * kKeyBlockRows;
  float sum[kTile];
  float segment[kTile];  // The first of the group under way.
  EDUBA_UNROLL
  for (int q = 0; q < kTile; ++q) sum[q] = segment[q] = high[q] = low[q] = 0;
  for (int first = 0; first < units; first += kUnitsAhead) {
    KeyUnit<Type> ahead[kUnitsAhead];
    EDUBA_UNROLL
    for (int i = 0; i < kUnitsAhead; ++i) {
      if (first + i < units) ahead[i] = LoadKeyUnit<Type>(key + (first + i) * kUnitStride);
    }
    EDUBA_UNROLL
    for (int i = 0; i < kUnitsAhead; ++i) {
      const int unit = first + i;
      if (unit >= units) break;
      float k[kUnitDims];
      Unpack(ahead[i], k);
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        float x[kUnitDims];
        LoadShared(queries + q * pitch + unit * kUnitDims, x);
        EDUBA_UNROLL
        for (int d = 0; d < kUnitDims; ++d) sum[q] = Fma(x[d], k[d], sum[q]);
      }
      // Units of 8 make a segment of 8 or 16.
      if (args.dot_segment == 2 * kUnitDims && unit % 2 == 0) continue;
      const bool is_pair = args.dot_group > args.dot_segment;
      const bool is_second = is_pair && unit / 2 % 2 == 1;
      if (is_pair && !is_second && unit + 1 < units) {
        EDUBA_UNROLL
        for (int q = 0; q < kTile; ++q) {
          segment[q] = sum[q];
          sum[q] = 0;
        }
        continue;
      }
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        // high + low is exactly what the groups before and this one add up to, until low is rounded.
        const float total = is_second ? Add(segment[q], sum[q]) : sum[q];
        const float before = high[q];
        high[q] = Add(before, total);
        const float part = Sub(high[q], before);
        low[q] = Add(Add(Sub(before, Sub(high[q], part)), Sub(total, part)), low[q]);
        sum[q] = 0;
      }
    }
  }
}

// weight * value for two neighbouring channels over the rows of one segment that some query vector sees.
template <class Type, int kTile>
EDUBA_DEVICE void WeighSegment(const char* values, int64_t row_bytes, int segment, const int* seen,
                               const float* weight, float (&sum)[kTile][2]) {
  EDUBA_UNROLL
  for (int q = 0; q < kTile; ++q) sum[q][0] = sum[q][1] = 0;
  for (int group = segment * (kRowSegment / kGroupRows); group < (segment + 1) * (kRowSegment / kGroupRows);
       ++group) {
    const int rows_seen = seen[group];
    if (rows_seen == 0) continue;
    float value[kGroupRows][2];
    if constexpr (Type::kElement == 4) {
      EDUBA_UNROLL
      for (int i = 0; i < kGroupRows; ++i) {
        // A row that nobody sees may hold anything: it counts as zeros, which its weight is as well.
        Load8 pair = {{0, 0}};
        if ((rows_seen >> i & 1) != 0) pair = LoadConstant8(values + (group * kGroupRows + i) * row_bytes);
        value[i][0] = Type::Value(pair.word[0]);
        value[i][1] = Type::Value(pair.word[1]);
      }
    } else {
      uint32_t pair[kGroupRows];
      EDUBA_UNROLL
      for (int i = 0; i < kGroupRows; ++i) {
        pair[i] =
            (rows_seen >> i & 1) != 0 ? LoadConstant4(values + (group * kGroupRows + i) * row_bytes) : 0;
      }
      EDUBA_UNROLL
      for (int i = 0; i < kGroupRows; ++i) {
        value[i][0] = Type::Low(pair[i]);
        value[i][1] = Type::High(pair[i]);
      }
    }
    EDUBA_UNROLL
    for (int i = 0; i < kGroupRows; ++i) {
      float w[kTile];
      LoadShared(weight + (group * kGroupRows + i) * kTile, w);
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        sum[q][0] = Fma(w[q], value[i][0], sum[q][0]);
        sum[q][1] = Fma(w[q], value[i][1], sum[q][1]);
      }
    }
  }
}

template <class Type, int kTile, class Block>
EDUBA_DEVICE void AttendPage(const Block& block, const AttendArgs& args) {
  const PageLayout& layout = args.layout;
  const AttendShared at = MakeAttendShared(kTile, layout.head_pitch, layout.value_pitch);
  float* const shared = block.shared();
  float* const query = shared + at.query;
  float* const high = shared + at.high;
  float* const low = shared + at.low;
  float* const segments = shared + at.segment;
  float* const weight = shared + at.weight;
  float* const lane = shared + at.lane;
  float* const m = shared + at.m;
  float* const l = shared + at.l;
  int* const finite = reinterpret_cast<int*>(shared + at.finite);
  int* const begin = reinterpret_cast<int*>(shared + at.begin);
  int* const end = reinterpret_cast<int*>(shared + at.end);
  int* const seen = reinterpret_cast<int*>(shared + at.seen);

  // Tiles of a page are neighbours, so that all but the first find it in the second-level cache.
  const int tile = static_cast<int>(block.index() % args.tiles);
  const int kv_head = static_cast<int>(block.index() / args.tiles % layout.kv_heads);
  const int64_t slot = block.index() / args.tiles / layout.kv_heads;
  const PageEntry page = args.page[slot];
  const int64_t row_heads = int64_t{args.rows} * args.query_heads;
  // Query vectors of a KV head are counted by row, then by head of the group.
  const int first_vector = tile * kTile;
  const int vectors = args.rows * args.group - first_vector;  // In this tile, if below kTile.
  const auto row_of = [&](int q) { return (first_vector + q) / args.group; };
  const auto row_head_of = [&](int q) {
    return int64_t{row_of(q)} * args.query_heads + kv_head * args.group + (first_vector + q) % args.group;
  };
  const bool capped = args.softcap > 0;

  block.Threads([&](int t) {
    for (int i = t; i < kTile * layout.head_pitch; i += kAttendThreads) {
      const int q = i / layout.head_pitch;
      const int d = i % layout.head_pitch;
      query[i] = q < vectors && d < layout.head_dim ? args.queries[row_head_of(q) * layout.head_dim + d] : 0;
    }
    if (t < kTile) {
      begin[t] = end[t] = 0;
      if (t < vectors) {
        const PositionRange range = args.visible[row_of(t)];
        const int64_t from = range.begin - page.index * kPageRows;
        const int64_t to = range.end - page.index * kPageRows;
        const int64_t first = from < 0 ? 0 : from;
        const int64_t last = to > kPageRows ? int64_t{kPageRows} : to;
        if (first < last) {
          begin[t] = static_cast<int>(first);
          end[t] = static_cast<int>(last);
        }
      }
      finite[t] = 1;
    }
  });

  bool any = false;
  for (int q = 0; q < kTile; ++q) any |= begin[q] < end[q];
  if (!any) {
    block.Threads([&](int t) {
      if (t < kTile && t < vectors) {
        args.m[slot * row_heads + row_head_of(t)] = -Infinity();
        args.l[slot * row_heads + row_head_of(t)] = 0;
      }
    });
    return;
  }

  block.Threads([&](int t) {
    const int row = t;
    bool needed = false;
    for (int q = 0; q < kTile; ++q) needed |= row >= begin[q] && row < end[q];
    float h[kTile];
    float w[kTile];
    if (needed) {
      const char* key =
          static_cast<const char*>(page.data) + layout.key(kv_head, row, 0) * int64_t{Type::kElement};
      DotKey<Type, kTile>(args, key, query, h, w);
    }
    EDUBA_UNROLL
    for (int q = 0; q < kTile; ++q) {
      const float dot = needed ? h[q] : 0;
      high[q * kScorePitch + row] = capped ? Capped(dot, args.scale, args.softcap) : dot;
      low[q * kScorePitch + row] = needed ? w[q] : 0;
    }
    if (t < kPageRows / kGroupRows) {
      int bits = 0;
      for (int i = 0; i < kGroupRows; ++i) {
        const int r = t * kGroupRows + i;
        bool some = false;
        for (int q = 0; q < kTile; ++q) some |= r >= begin[q] && r < end[q];
        bits |= some ? 1 << i : 0;
      }
      seen[t] = bits;
    }
  });

  // The largest visible logit: exact, so its order is free.
  block.Threads([&](int t) {
    if (t >= kSumLanes * kTile) return;
    const int q = t % kTile;
    float largest = -Infinity();
    bool all_finite = true;
    for (int row = t / kTile; row < kPageRows; row += kSumLanes) {
      if (row < begin[q] || row >= end[q]) continue;
      const float score = high[q * kScorePitch + row];
      const float x = capped ? score : Mul(score, args.scale);
      all_finite &= IsFinite(x);
      largest = x > largest ? x : largest;
    }
    lane[t] = largest;
    if (!all_finite) finite[q] = 0;
  });
  block.Threads([&](int t) {
    if (t >= kTile) return;
    float largest = -Infinity();
    for (int i = 0; i < kSumLanes; ++i) {
      const float x = lane[i * kTile + t];
      largest = x > largest ? x : largest;
    }
    m[t] = largest;
  });

  block.Threads([&](int t) {
    const int row = t;
    EDUBA_UNROLL
    for (int q = 0; q < kTile; ++q) {
      float p = 0;
      if (row >= begin[q] && row < end[q]) {
        const float score = high[q * kScorePitch + row];
        // Fused with the scale, so that a logit is rounded once, and after the largest was taken away.
        p = Exp(capped ? Sub(score, m[q])
                       : Fma(low[q * kScorePitch + row], args.scale, Fma(score, args.scale, -m[q])));
      }
      weight[row * kTile + q] = p;
    }
  });

  block.Threads([&](int t) {
    if (t >= kSumLanes * kTile) return;
    float sum = 0;
    for (int i = 0; i < kPageRows / kSumLanes; ++i) sum = Add(sum, weight[i * kSumLanes * kTile + t]);
    lane[t] = sum;
  });

  // Keys, queries and scores are not read any more: the segments' sums take their place.
  block.Threads([&](int t) {
    if (t < kTile) {
      static_assert(kSumLanes == 16);
      float tree[8];
      EDUBA_UNROLL
      for (int i = 0; i < 8; ++i) tree[i] = Add(lane[i * kTile + t], lane[(i + 8) * kTile + t]);
      EDUBA_UNROLL
      for (int i = 0; i < 4; ++i) tree[i] = Add(tree[i], tree[i + 4]);
      l[t] = Add(Add(tree[0], tree[2]), Add(tree[1], tree[3]));
    }
    const int pairs = layout.value_pitch / 2;
    for (int item = t; item < kSegments * pairs; item += kAttendThreads) {
      const int segment = item / pairs;
      const int channel = item % pairs * 2;
      float sum[kTile][2];
      WeighSegment<Type, kTile>(
          static_cast<const char*>(page.data) + layout.value(kv_head, 0, channel) * int64_t{Type::kElement},
          int64_t{layout.value_pitch} * Type::kElement, segment, seen, weight, sum);
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        float* to = segments + (q * kSegments + segment) * layout.value_pitch + channel;
        to[0] = sum[q][0];
        to[1] = sum[q][1];
      }
    }
  });

  block.Threads([&](int t) {
    for (int i = t; i < kTile * layout.value_pitch; i += kAttendThreads) {
      const int q = i / layout.value_pitch;
      const int c = i % layout.value_pitch;
      if (begin[q] >= end[q]) continue;
      float total = 0;
      EDUBA_UNROLL
      for (int s = 0; s < kSegments; ++s) {
        total = Add(total, segments[(q * kSegments + s) * layout.value_pitch + c]);
      }
      if (!IsFinite(total)) finite[q] = 0;  // Whoever writes it writes the same.
      args.o[(slot * row_heads + row_head_of(q)) * layout.value_pitch + c] = total;
    }
  });

  block.Threads([&](int t) {
    if (t >= kTile || t >= vectors) return;
    KeepTotals(args, slot, page.index, row_head_of(t), begin[t] < end[t], finite[t] != 0 && IsFinite(l[t]),
               m[t], l[t]);
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_
