#ifndef EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_
#define EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/portable_math.h"

// One KV head of some pages against a tile of query vectors, by one block of threads: docs/numerics.md
// section 2, in the order of kernels/cpu, so to the same bits. Each page ends in one of two ways: as a
// partial in the device's memory, or, where the reference logits are known, as integers that the block adds
// up in shared memory over all its pages (section 3) and adds to the step's words once, at its end.
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
  int tile;   // Query vectors of a block: 1, 2, 4 or 8; on tensor cores, up to 8 times 16.
  int tiles;  // ceil(rows * group / tile)
  int64_t pages;
  int64_t runs;          // Of pages, for each KV head and tile: one block takes one. Not of page_tensor.h.
  int query_terms;       // Of page_warpgroup.h alone: QueryTerms.
  const float* queries;  // [rows, query_heads, head_dim]
  const PositionRange* visible;  // [rows]
  const PageEntry* page;         // [pages]
  uint64_t* fault;               // FaultKey of the lowest page and row head; 0 at the start

  // Partials, or null.
  float* m;          // [pages, rows * query_heads]; -inf: sees nothing, +inf: a fault
  float* l;          // As m.
  float* o;          // [pages, rows * query_heads, value_pitch]; not set where m is infinite
  uint32_t* maxima;  // [rows * query_heads]: OrderOf the largest m; 0 at the start; or null

  // Integers, or null.
  double one;               // 2^fraction bits
  uint64_t limit;           // Largest sum of l, in units of 1 / one: 2^56 at most.
  const double* reference;  // [rows * query_heads]: the logit that weights are relative to
  const double* unit;       // [kv_heads, value_dim]
  uint64_t* words;          // [rows * query_heads, value_dim + 2]: as SumArgs::words

  constexpr bool is_summed() const { return words != nullptr; }
  constexpr int64_t blocks() const { return pages == 0 ? 0 : runs * layout.kv_heads * tiles; }
};

// backend.h's kFaultFlag.
inline constexpr uint64_t kFault = uint64_t{1} << 32;

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
    if (args.maxima != nullptr) AtomicMax(&args.maxima[row_head], OrderOf(largest));
    if (!good) AtomicMax(args.fault, FaultKey(page, row_head));
  }
  const int64_t place = slot * args.rows * args.query_heads + row_head;
  args.m[place] = largest;
  args.l[place] = sum;
}

// Adds a block's sum to the total L of a row and head, and sets the flag behind it: whether the rank's total
// is above the limit, exactly, whoever adds when. Terms are not negative, so the total passes the limit at
// most once, in the addition of one block, which sees that it did; what comes later (it may wrap around)
// clears no flag. Where the flag is set the row and head's other words mean nothing.
EDUBA_DEVICE void AddToTotal(uint64_t* total, uint64_t sum, bool is_fault, uint64_t limit) {
  uint64_t* const flag = total + 1;
  if (sum > 0 && (sum > limit || AtomicAdd(total, sum) + sum > limit)) AtomicMax(flag, uint64_t{1});
  if (is_fault) AtomicMax(flag, kFault);
}

// A query vector's own, for all pages of a block.
struct VectorState {
  int64_t begin;  // Positions that it sees.
  int64_t end;
  int64_t row_head;
  // Where the block sums, the rest as well.
  double reference;
  uint64_t l;  // The sum of L so far; above the limit: it left the range, and is counted no more.
  uint64_t
      fault;      // 1: some arithmetic of its pages was not finite, or a value beyond its channel's exponent.
  double weight;  // Of the page under way: exp(m - reference).
  double bound;   // Of the magnitude of the page's words; below 0: the page adds nothing.
};

// What a block keeps in shared memory, in floats from its start.
struct AttendShared {
  int vector;   // [tile] VectorState
  int sum;      // [tile, value_pitch] int64, where the block sums
  int query;    // [tile, head_pitch]
  int high;     // [tile, kScorePitch]: dot products, or capped logits
  int low;      // [tile, kScorePitch]: what their rounding left
  int segment;  // [tile, kSegments, value_pitch]; over the two above, when they are not needed any more
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
constexpr AttendShared MakeAttendShared(int tile, int head_pitch, int value_pitch, bool is_summed) {
  static_assert(sizeof(VectorState) % 16 == 0);
  AttendShared s = {};
  s.vector = 0;
  s.sum = tile * static_cast<int>(sizeof(VectorState) / sizeof(float));
  s.query = s.sum + (is_summed ? 2 * tile * value_pitch : 0);
  s.high = s.query + tile * head_pitch;
  s.low = s.high + tile * kScorePitch;
  s.segment = s.high;
  const int first = s.low + tile * kScorePitch;
  const int second = s.segment + tile * kSegments * value_pitch;
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

// How a page's partial (m, l) enters the sums of its query vector: how heavy it is, and what it adds to L.
// docs/numerics.md section 3; kernels/cpu/page_sums.cc, operation for operation.
EDUBA_DEVICE void WeighPage(const AttendArgs& args, float m, float l, VectorState& v) {
  const double distance = Sub(static_cast<double>(m), v.reference);
  v.weight = PortableExp(distance > 700.0 ? 700.0 : distance);  // exp(700) is out of every range.
  const double scaled = Mul(Mul(static_cast<double>(l), v.weight), args.one);
  v.bound = -1;
  if (scaled > static_cast<double>(args.limit)) {
    v.l = args.limit + 1;
    return;
  }
  if (scaled < 0.25) return;  // Every word rounds to 0.
  // Of a page: 2^56 at most, and so far as well.
  v.l += static_cast<uint64_t>(RoundToInteger(scaled));
  // |o| <= l 2^e, but for rounding, or a value is beyond its channel's exponent.
  if (v.l <= args.limit) v.bound = Add(Mul(1.001, scaled), 1.0);
}

// Notes that some arithmetic of a page was not finite, or a value beyond its channel's exponent.
EDUBA_DEVICE void FailPage(const AttendArgs& args, int64_t page, VectorState& v) {
  if (v.reference == -static_cast<double>(Infinity())) return;
  AtomicMax(args.fault, FaultKey(page, v.row_head));
  v.fault = 1;
}

// A page's m and l enter the sums of its query vector. `good`: both are finite.
EDUBA_DEVICE void TakePage(const AttendArgs& args, int64_t page, bool sees_keys, bool good, float m, float l,
                           VectorState& v) {
  v.bound = -1;
  if (!sees_keys || v.reference == -static_cast<double>(Infinity())) return;
  if (!good) {
    FailPage(args, page, v);
  } else if (v.reference == static_cast<double>(Infinity())) {
    v.fault = 1;
  } else if (v.l <= args.limit) {
    WeighPage(args, m, l, v);
  }
}

// Adds what a channel's o adds to its word, and nothing where that is beyond `bound`, or no number: false.
EDUBA_DEVICE bool AddWord(float o, double weight, double unit, double bound, uint64_t& word) {
  const double x = Mul(Mul(static_cast<double>(o), weight), unit);
  const bool is_good = Abs(x) <= bound;
  word += static_cast<uint64_t>(RoundToInteger(is_good ? x : 0.0));  // Without a branch.
  return is_good;
}

// Phases of a page, and what passes between them through shared memory: a phase's results are read in later
// phases only, and a place is written again only in a phase behind the last that reads it. The places that
// several threads write in one phase (finite, VectorState::fault) get the same value from all of them.
template <class Type, int kTile, class Block>
EDUBA_DEVICE void AttendPages(const Block& block, const AttendArgs& args) {
  const PageLayout& layout = args.layout;
  const bool is_summed = args.is_summed();
  const AttendShared at = MakeAttendShared(kTile, layout.head_pitch, layout.value_pitch, is_summed);
  float* const shared = block.shared();
  auto* const vector = reinterpret_cast<VectorState*>(shared + at.vector);
  auto* const sum = reinterpret_cast<uint64_t*>(shared + at.sum);
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
  const int64_t run = block.index() / args.tiles / layout.kv_heads;
  const int64_t row_heads = int64_t{args.rows} * args.query_heads;
  // Query vectors of a KV head are counted by row, then by head of the group.
  const int first_vector = tile * kTile;
  const int vectors = args.rows * args.group - first_vector;  // In this tile, if below kTile.
  const bool capped = args.softcap > 0;

  block.Threads([&](int t) {
    if (t >= kTile) return;
    VectorState& v = vector[t];
    v.begin = v.end = 0;
    v.row_head = 0;
    v.reference = 0;
    v.l = v.fault = 0;
    if (t >= vectors) return;
    const int row = (first_vector + t) / args.group;
    v.begin = args.visible[row].begin;
    v.end = args.visible[row].end;
    v.row_head = int64_t{row} * args.query_heads + kv_head * args.group + (first_vector + t) % args.group;
    if (is_summed) v.reference = args.reference[v.row_head];
  });
  block.Threads([&](int t) {
    for (int i = t; i < kTile * layout.head_pitch; i += kAttendThreads) {
      const int q = i / layout.head_pitch;
      const int d = i % layout.head_pitch;
      query[i] =
          q < vectors && d < layout.head_dim ? args.queries[vector[q].row_head * layout.head_dim + d] : 0;
    }
    // A thread's own from here to the end: element i is read and written by thread i % kAttendThreads alone.
    if (is_summed) {
      for (int i = t; i < kTile * layout.value_pitch; i += kAttendThreads) sum[i] = 0;
    }
  });

  const int64_t last_slot = (run + 1) * args.pages / args.runs;
  for (int64_t slot = run * args.pages / args.runs; slot < last_slot; ++slot) {
    const PageEntry page = args.page[slot];
    const int64_t page_begin = page.index * kPageRows;
    const int64_t page_end = page_begin + kPageRows;
    bool any = false;
    for (int q = 0; q < kTile; ++q) {
      any |= vector[q].begin < vector[q].end && vector[q].begin < page_end && vector[q].end > page_begin;
    }
    if (!any) {
      if (is_summed) continue;
      block.Threads([&](int t) {
        if (t < kTile && t < vectors) {
          args.m[slot * row_heads + vector[t].row_head] = -Infinity();
          args.l[slot * row_heads + vector[t].row_head] = 0;
        }
      });
      continue;
    }
    // A barrier lies between the last reads of these for the page before and here.
    block.Threads([&](int t) {
      if (t >= kTile) return;
      const int64_t from = vector[t].begin - page_begin;
      const int64_t to = vector[t].end - page_begin;
      const int64_t first = from < 0 ? 0 : from;
      const int64_t last = to > kPageRows ? int64_t{kPageRows} : to;
      begin[t] = first < last ? static_cast<int>(first) : 0;
      end[t] = first < last ? static_cast<int>(last) : 0;
      finite[t] = 1;
    });

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
          const bool is_fused = m[q] <= kFusedLogitMax && m[q] >= -kFusedLogitMax;
          p = Exp(capped     ? Sub(score, m[q])
                  : is_fused ? Fma(low[q * kScorePitch + row], args.scale, Fma(score, args.scale, -m[q]))
                             : Sub(Mul(score, args.scale), m[q]));
        }
        weight[row * kTile + q] = p;
      }
    });

    block.Threads([&](int t) {
      if (t >= kSumLanes * kTile) return;
      float total = 0;
      for (int i = 0; i < kPageRows / kSumLanes; ++i) total = Add(total, weight[i * kSumLanes * kTile + t]);
      lane[t] = total;
    });

    // Keys and scores are not read any more: the segments' sums take their place.
    block.Threads([&](int t) {
      if (t < kTile) {
        static_assert(kSumLanes == 16);
        float tree[8];
        EDUBA_UNROLL
        for (int i = 0; i < 8; ++i) tree[i] = Add(lane[i * kTile + t], lane[(i + 8) * kTile + t]);
        EDUBA_UNROLL
        for (int i = 0; i < 4; ++i) tree[i] = Add(tree[i], tree[i + 4]);
        const float total = Add(Add(tree[0], tree[2]), Add(tree[1], tree[3]));
        l[t] = total;
        if (is_summed) {
          TakePage(args, page.index, begin[t] < end[t], finite[t] != 0 && IsFinite(total), m[t], total,
                   vector[t]);
        }
      }
      const int pairs = layout.value_pitch / 2;
      for (int item = t; item < kSegments * pairs; item += kAttendThreads) {
        const int segment = item / pairs;
        const int channel = item % pairs * 2;
        float pair[kTile][2];
        WeighSegment<Type, kTile>(
            static_cast<const char*>(page.data) + layout.value(kv_head, 0, channel) * int64_t{Type::kElement},
            int64_t{layout.value_pitch} * Type::kElement, segment, seen, weight, pair);
        EDUBA_UNROLL
        for (int q = 0; q < kTile; ++q) {
          float* to = segments + (q * kSegments + segment) * layout.value_pitch + channel;
          to[0] = pair[q][0];
          to[1] = pair[q][1];
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
        if (!is_summed) {
          if (!IsFinite(total)) finite[q] = 0;
          args.o[(slot * row_heads + vector[q].row_head) * layout.value_pitch + c] = total;
          continue;
        }
        VectorState& v = vector[q];
        // The padding's values are zeros.
        const bool is_good =
            IsFinite(total) &&
            (v.bound < 0 || c >= layout.value_dim ||
             AddWord(total, v.weight, args.unit[int64_t{kv_head} * layout.value_dim + c], v.bound, sum[i]));
        if (!is_good) FailPage(args, page.index, v);
      }
    });

    if (is_summed) continue;
    block.Threads([&](int t) {
      if (t >= kTile || t >= vectors) return;
      KeepTotals(args, slot, page.index, vector[t].row_head, begin[t] < end[t],
                 finite[t] != 0 && IsFinite(l[t]), m[t], l[t]);
    });
  }

  if (!is_summed) return;
  block.Threads([&](int t) {
    for (int i = t; i < kTile * layout.value_pitch; i += kAttendThreads) {
      const int q = i / layout.value_pitch;
      const int c = i % layout.value_pitch;
      if (q >= vectors || c >= layout.value_dim) continue;
      uint64_t* const words = args.words + vector[q].row_head * (layout.value_dim + 2);
      if (sum[i] != 0) AtomicAdd(&words[c], sum[i]);
    }
    if (t < kTile && t < vectors) {
      uint64_t* const words = args.words + vector[t].row_head * (layout.value_dim + 2);
      AddToTotal(words + layout.value_dim, vector[t].l, vector[t].fault != 0, args.limit);
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_
