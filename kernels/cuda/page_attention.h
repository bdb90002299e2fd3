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
// The code is written once for the device and for a host that emulates it (emulated_device.h). A Block runs
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
inline constexpr int kUnitsAhead = 4;  // Units that are loaded before they are used.
static_assert(kPageRows == kAttendThreads && kPageRows / kGroupRows == 16);

struct PageEntry {
  const void* data;  // After the page's header.
  int64_t index;
  const uint64_t* live;  // PageRef::live, in the device's memory.
};

// Rows [begin, end) of a page that a list names: PageRows (kernels/seen_pages.h), for the device.
struct ListedRows {
  int16_t begin;
  int16_t end;
};

// Keys [begin, end) of a page.
struct KeyRange {
  int begin;
  int end;
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
  // Runs of pages, for each KV head and tile: one block takes one. Not used by page_tensor.h.
  int64_t runs;
  int query_terms;               // QueryTerms; used by page_warpgroup.h alone.
  const float* queries;          // [rows, query_heads, head_dim]
  const PositionRange* visible;  // [rows]
  const int32_t* row_list;       // [rows]: the list of each row
  // What list i has of page p: listed[i * list_stride + p].
  const ListedRows* listed;
  int64_t list_stride;
  bool whole_lists;       // Every list has all of every page.
  const PageEntry* page;  // [pages]
  uint64_t* fault;        // FaultKey of the lowest page and row head; 0 at the start

  // Partials, or null.
  float* m;          // [pages, rows * query_heads]; -inf: sees nothing, +inf: a fault
  float* l;          // Laid out as m is.
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

// Adds a block's sum to the total L of a row and head, and sets the flag that follows it: whether the rank's
// total is above the limit, exactly, whoever adds when. Terms are not negative, so the total passes the limit
// at most once, in the addition of one block, which sees that it did; what comes later (it may wrap around)
// clears no flag. Where the flag is set the row and head's other words mean nothing.
EDUBA_DEVICE void AddToTotal(uint64_t* total, uint64_t sum, bool is_fault, uint64_t limit) {
  uint64_t* const flag = total + 1;
  if (sum > 0 && (sum > limit || AtomicAdd(total, sum) + sum > limit)) AtomicMax(flag, uint64_t{1});
  if (is_fault) AtomicMax(flag, kFault);
}

// A query vector's own, for all pages of a block.
struct VectorState {
  int32_t begin;  // Positions that it may see.
  int32_t end;
  const ListedRows* listed;  // [pages]: what its list has of them; null where it may see nothing.
  int64_t row_head;
  // Where the block sums, the rest as well.
  double reference;
  uint64_t l;  // The sum of L so far; above the limit: it left the range, and is counted no more.
  uint64_t
      fault;      // 1: some arithmetic of its pages was not finite, or a value beyond its channel's exponent.
  double weight;  // The weight of the page under way: exp(m - reference).
  double bound;   // A bound of the page's words' magnitude; below 0: the page adds nothing.
};

EDUBA_DEVICE bool IsLive(const PageEntry& page, int row) {
  return page.live == nullptr || (page.live[row / 64] >> (row % 64) & 1) != 0;
}

// Sets what vector state `v` of query row `row` may see.
EDUBA_DEVICE void SetVisible(const AttendArgs& args, int row, VectorState& v) {
  const PositionRange visible = args.visible[row];
  v.begin = v.end = 0;
  v.listed = nullptr;
  if (visible.begin >= visible.end) return;
  v.begin = static_cast<int32_t>(visible.begin);
  v.end = static_cast<int32_t>(visible.end);
  v.listed = args.listed + args.row_list[row] * args.list_stride;
}

// The keys of page `slot` that a query vector may see: dead ones are among them.
EDUBA_DEVICE KeyRange ListedKeys(const VectorState& v, int64_t slot, int64_t page) {
  if (v.begin >= v.end) return {0, 0};
  const ListedRows listed = v.listed[slot];
  const int64_t from = v.begin - page * kPageRows;
  const int64_t to = v.end - page * kPageRows;
  const int64_t first = from < listed.begin ? int64_t{listed.begin} : from;
  const int64_t last = to > listed.end ? int64_t{listed.end} : to;
  if (first >= last) return {0, 0};
  return {static_cast<int>(first), static_cast<int>(last)};
}

// The same without the dead keys at both ends; dead keys inside the range are not seen either.
EDUBA_DEVICE KeyRange KeysSeen(const VectorState& v, int64_t slot, const PageEntry& page) {
  KeyRange keys = ListedKeys(v, slot, page.index);
  if (page.live == nullptr) return keys;
  while (keys.begin < keys.end && !IsLive(page, keys.begin)) ++keys.begin;
  while (keys.begin < keys.end && !IsLive(page, keys.end - 1)) --keys.end;
  if (keys.begin >= keys.end) return {0, 0};
  return keys;
}

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
  // One page adds 2^56 at most, and the sum so far is 2^56 at most as well.
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

// One block's work. Phases of a page, and what passes between them through shared memory: a phase's results
// are read in later phases only, and a place is written again only in a phase after the last that reads it.
// The places that several threads write in one phase (finite, VectorState::fault) get the same value from all
// of them.
template <class Type, int kTile, class Block>
class PagesWork {
 public:
  EDUBA_DEVICE PagesWork(const Block& block, const AttendArgs& args)
      : block_(block),
        args_(args),
        layout_(args.layout),
        is_summed_(args.is_summed()),
        capped_(args.softcap > 0),
        // Tiles of a page are neighbours, so that all but the first find it in the second-level cache.
        first_vector_(static_cast<int>(block.index() % args.tiles) * kTile),
        vectors_(args.rows * args.group - first_vector_),
        kv_head_(static_cast<int>(block.index() / args.tiles % args.layout.kv_heads)),
        run_(block.index() / args.tiles / args.layout.kv_heads),
        row_heads_(int64_t{args.rows} * args.query_heads) {
    const AttendShared at = MakeAttendShared(kTile, layout_.head_pitch, layout_.value_pitch, is_summed_);
    float* const shared = block.shared();
    vector_ = reinterpret_cast<VectorState*>(shared + at.vector);
    sum_ = reinterpret_cast<uint64_t*>(shared + at.sum);
    query_ = shared + at.query;
    high_ = shared + at.high;
    low_ = shared + at.low;
    segments_ = shared + at.segment;
    weight_ = shared + at.weight;
    lane_ = shared + at.lane;
    m_ = shared + at.m;
    l_ = shared + at.l;
    finite_ = reinterpret_cast<int*>(shared + at.finite);
    begin_ = reinterpret_cast<int*>(shared + at.begin);
    end_ = reinterpret_cast<int*>(shared + at.end);
    seen_ = reinterpret_cast<int*>(shared + at.seen);
  }

  EDUBA_DEVICE void Run() {
    LoadVectors();
    const int64_t last_slot = (run_ + 1) * args_.pages / args_.runs;
    for (int64_t slot = run_ * args_.pages / args_.runs; slot < last_slot; ++slot) {
      const PageEntry page = args_.page[slot];
      if (!SeesPage(slot, page.index)) {
        if (!is_summed_) KeepNothing(slot);
        continue;
      }
      FindRows(slot, page);
      MultiplyKeys(page);
      FindLargest(page);
      WeighKeys(page);
      AddWeights();
      MultiplyValues(page);
      AddSegments(slot, page);
      if (!is_summed_) KeepPartials(slot, page);
    }
    if (is_summed_) AddToWords();
  }

 private:
  // Query vectors of a KV head are counted by row, then by head of the group.
  EDUBA_DEVICE void LoadVectors() {
    block_.Threads([&](int t) {
      if (t >= kTile) return;
      VectorState& v = vector_[t];
      v.begin = v.end = 0;
      v.listed = nullptr;
      v.row_head = 0;
      v.reference = 0;
      v.l = v.fault = 0;
      if (t >= vectors_) return;
      const int row = (first_vector_ + t) / args_.group;
      SetVisible(args_, row, v);
      v.row_head =
          int64_t{row} * args_.query_heads + kv_head_ * args_.group + (first_vector_ + t) % args_.group;
      if (is_summed_) v.reference = args_.reference[v.row_head];
    });
    block_.Threads([&](int t) {
      for (int i = t; i < kTile * layout_.head_pitch; i += kAttendThreads) {
        const int q = i / layout_.head_pitch;
        const int d = i % layout_.head_pitch;
        query_[i] = q < vectors_ && d < layout_.head_dim
                        ? args_.queries[vector_[q].row_head * layout_.head_dim + d]
                        : 0;
      }
      // A thread's own from here to the end: element i is read and written by thread i % kAttendThreads
      // alone.
      if (is_summed_) {
        for (int i = t; i < kTile * layout_.value_pitch; i += kAttendThreads) sum_[i] = 0;
      }
    });
  }

  // Whether some query vector may see keys of a page; alike for all threads, and without a phase.
  EDUBA_DEVICE bool SeesPage(int64_t slot, int64_t page) const {
    bool any = false;
    for (int q = 0; q < kTile; ++q) {
      const KeyRange keys = ListedKeys(vector_[q], slot, page);
      any |= keys.begin < keys.end;
    }
    return any;
  }

  EDUBA_DEVICE void KeepNothing(int64_t slot) {
    block_.Threads([&](int t) {
      if (t < kTile && t < vectors_) {
        args_.m[slot * row_heads_ + vector_[t].row_head] = -Infinity();
        args_.l[slot * row_heads_ + vector_[t].row_head] = 0;
      }
    });
  }

  // A barrier lies between the last reads of these for the page before and here.
  EDUBA_DEVICE void FindRows(int64_t slot, const PageEntry& page) {
    block_.Threads([&](int t) {
      if (t >= kTile) return;
      const KeyRange keys = KeysSeen(vector_[t], slot, page);
      begin_[t] = keys.begin;
      end_[t] = keys.end;
      finite_[t] = 1;
    });
  }

  // Whether some query vector sees a row.
  EDUBA_DEVICE bool IsNeeded(const PageEntry& page, int row) const {
    bool needed = false;
    for (int q = 0; q < kTile; ++q) needed |= row >= begin_[q] && row < end_[q];
    return needed && IsLive(page, row);
  }

  EDUBA_DEVICE void MultiplyKeys(const PageEntry& page) {
    block_.Threads([&](int t) {
      const int row = t;
      const bool needed = IsNeeded(page, row);
      float h[kTile];
      float w[kTile];
      if (needed) {
        const char* key =
            static_cast<const char*>(page.data) + layout_.key(kv_head_, row, 0) * int64_t{Type::kElement};
        DotKey<Type, kTile>(args_, key, query_, h, w);
      }
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        const float dot = needed ? h[q] : 0;
        high_[q * kScorePitch + row] = capped_ ? Capped(dot, args_.scale, args_.softcap) : dot;
        low_[q * kScorePitch + row] = needed ? w[q] : 0;
      }
      if (t < kPageRows / kGroupRows) {
        int bits = 0;
        for (int i = 0; i < kGroupRows; ++i) bits |= IsNeeded(page, t * kGroupRows + i) ? 1 << i : 0;
        seen_[t] = bits;
      }
    });
  }

  // The largest visible logit: exact, so its order is free.
  EDUBA_DEVICE void FindLargest(const PageEntry& page) {
    block_.Threads([&](int t) {
      if (t >= kSumLanes * kTile) return;
      const int q = t % kTile;
      float largest = -Infinity();
      bool all_finite = true;
      for (int row = t / kTile; row < kPageRows; row += kSumLanes) {
        if (row < begin_[q] || row >= end_[q] || !IsLive(page, row)) continue;
        const float score = high_[q * kScorePitch + row];
        const float x = capped_ ? score : Mul(score, args_.scale);
        all_finite &= IsFinite(x);
        largest = x > largest ? x : largest;
      }
      lane_[t] = largest;
      if (!all_finite) finite_[q] = 0;
    });
    block_.Threads([&](int t) {
      if (t >= kTile) return;
      float largest = -Infinity();
      for (int i = 0; i < kSumLanes; ++i) {
        const float x = lane_[i * kTile + t];
        largest = x > largest ? x : largest;
      }
      m_[t] = largest;
    });
  }

  // From logits to weights.
  EDUBA_DEVICE void WeighKeys(const PageEntry& page) {
    block_.Threads([&](int t) {
      const int row = t;
      EDUBA_UNROLL
      for (int q = 0; q < kTile; ++q) {
        float p = 0;
        if (row >= begin_[q] && row < end_[q] && IsLive(page, row)) {
          const float score = high_[q * kScorePitch + row];
          // Fused with the scale, so that a logit is rounded once, and after the largest was taken away.
          const bool is_fused = m_[q] <= kFusedLogitMax && m_[q] >= -kFusedLogitMax;
          p = Exp(capped_    ? Sub(score, m_[q])
                  : is_fused ? Fma(low_[q * kScorePitch + row], args_.scale, Fma(score, args_.scale, -m_[q]))
                             : Sub(Mul(score, args_.scale), m_[q]));
        }
        weight_[row * kTile + q] = p;
      }
    });
  }

  // Adds up the weights of each virtual lane; TotalOf adds up the lanes.
  EDUBA_DEVICE void AddWeights() {
    block_.Threads([&](int t) {
      if (t >= kSumLanes * kTile) return;
      float total = 0;
      for (int i = 0; i < kPageRows / kSumLanes; ++i) total = Add(total, weight_[i * kSumLanes * kTile + t]);
      lane_[t] = total;
    });
  }

  EDUBA_DEVICE float TotalOf(int q) const {
    static_assert(kSumLanes == 16);
    float tree[8];
    EDUBA_UNROLL
    for (int i = 0; i < 8; ++i) tree[i] = Add(lane_[i * kTile + q], lane_[(i + 8) * kTile + q]);
    EDUBA_UNROLL
    for (int i = 0; i < 4; ++i) tree[i] = Add(tree[i], tree[i + 4]);
    return Add(Add(tree[0], tree[2]), Add(tree[1], tree[3]));
  }

  // Keys and scores are not read any more: the segments' sums take their place.
  EDUBA_DEVICE void MultiplyValues(const PageEntry& page) {
    block_.Threads([&](int t) {
      if (t < kTile) {
        const float total = TotalOf(t);
        l_[t] = total;
        if (is_summed_) {
          TakePage(args_, page.index, begin_[t] < end_[t], finite_[t] != 0 && IsFinite(total), m_[t], total,
                   vector_[t]);
        }
      }
      const int pairs = layout_.value_pitch / 2;
      for (int item = t; item < kSegments * pairs; item += kAttendThreads) {
        const int segment = item / pairs;
        const int channel = item % pairs * 2;
        float pair[kTile][2];
        WeighSegment<Type, kTile>(static_cast<const char*>(page.data) +
                                      layout_.value(kv_head_, 0, channel) * int64_t{Type::kElement},
                                  int64_t{layout_.value_pitch} * Type::kElement, segment, seen_, weight_,
                                  pair);
        EDUBA_UNROLL
        for (int q = 0; q < kTile; ++q) {
          float* to = segments_ + (q * kSegments + segment) * layout_.value_pitch + channel;
          to[0] = pair[q][0];
          to[1] = pair[q][1];
        }
      }
    });
  }

  // Each channel's o, as a partial or into the block's sums.
  EDUBA_DEVICE void AddSegments(int64_t slot, const PageEntry& page) {
    block_.Threads([&](int t) {
      for (int i = t; i < kTile * layout_.value_pitch; i += kAttendThreads) {
        const int q = i / layout_.value_pitch;
        const int c = i % layout_.value_pitch;
        if (begin_[q] >= end_[q]) continue;
        float total = 0;
        EDUBA_UNROLL
        for (int s = 0; s < kSegments; ++s) {
          total = Add(total, segments_[(q * kSegments + s) * layout_.value_pitch + c]);
        }
        if (!is_summed_) {
          if (!IsFinite(total)) finite_[q] = 0;
          args_.o[(slot * row_heads_ + vector_[q].row_head) * layout_.value_pitch + c] = total;
          continue;
        }
        VectorState& v = vector_[q];
        // The padding's values are zeros.
        const bool is_good = IsFinite(total) &&
                             (v.bound < 0 || c >= layout_.value_dim ||
                              AddWord(total, v.weight, args_.unit[int64_t{kv_head_} * layout_.value_dim + c],
                                      v.bound, sum_[i]));
        if (!is_good) FailPage(args_, page.index, v);
      }
    });
  }

  EDUBA_DEVICE void KeepPartials(int64_t slot, const PageEntry& page) {
    block_.Threads([&](int t) {
      if (t >= kTile || t >= vectors_) return;
      KeepTotals(args_, slot, page.index, vector_[t].row_head, begin_[t] < end_[t],
                 finite_[t] != 0 && IsFinite(l_[t]), m_[t], l_[t]);
    });
  }

  // The block's sums join the step's.
  EDUBA_DEVICE void AddToWords() {
    block_.Threads([&](int t) {
      for (int i = t; i < kTile * layout_.value_pitch; i += kAttendThreads) {
        const int q = i / layout_.value_pitch;
        const int c = i % layout_.value_pitch;
        if (q >= vectors_ || c >= layout_.value_dim) continue;
        uint64_t* const words = args_.words + vector_[q].row_head * (layout_.value_dim + 2);
        if (sum_[i] != 0) AtomicAdd(&words[c], sum_[i]);
      }
      if (t < kTile && t < vectors_) {
        uint64_t* const words = args_.words + vector_[t].row_head * (layout_.value_dim + 2);
        AddToTotal(words + layout_.value_dim, vector_[t].l, vector_[t].fault != 0, args_.limit);
      }
    });
  }

  const Block& block_;
  const AttendArgs& args_;
  const PageLayout& layout_;
  const bool is_summed_;
  const bool capped_;
  const int first_vector_;
  const int vectors_;  // In this tile, if below kTile.
  const int kv_head_;
  const int64_t run_;
  const int64_t row_heads_;
  // In shared memory: AttendShared.
  VectorState* vector_;
  uint64_t* sum_;
  float* query_;
  float* high_;
  float* low_;
  float* segments_;
  float* weight_;
  float* lane_;
  float* m_;
  float* l_;
  int* finite_;
  int* begin_;
  int* end_;
  int* seen_;
};

template <class Type, int kTile, class Block>
EDUBA_DEVICE void AttendPages(const Block& block, const AttendArgs& args) {
  PagesWork<Type, kTile, Block>(block, args).Run();
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_ATTENTION_H_
