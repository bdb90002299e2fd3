#ifndef EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_
#define EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/cuda/page_tensor.h"

// One KV head of a run of pages against a tile of 64 or 128 query vectors, on tensor cores as sm_90a has them
// (wgmma): docs/numerics.md section 2.1. The arithmetic is page_tensor.h's, but for the number of terms of a
// weight (kWeightTerms), and what a product of 16 adds up in which order is the chip's.
//
// A block has three warpgroups. The first loads: keys by the engine for bulk copies, values by copies of 16
// bytes, which can leave out rows that nobody sees. The others multiply: each takes 64 query vectors, or both
// take the same 64 and every other page. What is loaded goes through a ring of slots, each with two barriers:
// `full` when it may be read, `empty` when it may be written.
//
// A multiplying thread has the logits of two vectors with all keys of a page: 128 registers. So the maximum
// is known before the first weight, nothing is rescaled, and the sequence of products is the page's: 16
// dimensions at a time for all its keys, then 16 keys at a time for up to 128 channels.
//
// A page ends as in page_attention.h: as a partial, or as integers that a group adds up in shared memory over
// all its pages, where they have room beside the slots (ChooseWarpgroupTile).
//
// Beyond what page_tensor.h asks of a Block, and all of it so that a host can play it (emulated_warpgroup.h):
//   Uniform(x)                    x, which all threads of a warp have alike: the compiler cannot know
//   Groups(f)                     f(group) for each warpgroup, all at the same time; its warps have Sync(), a
//                                 barrier of their lanes, and a group has
//     Threads(f)                    f(t) for each of its threads, 0 to 127, without a barrier
//     Warps(f)                      f(warp) for each of its warps, 0 to 3
//     Sync()                        a barrier of its threads
//     TakeRegisters<n>()            has n registers a thread from here on; GiveRegisters<n>(): no more than n
//     Wait(barrier, parity)         until the barrier has finished a phase of this parity
//     MultiplyKeys<Type>(c_of, a, b, is_sum)   c (+)= a b, both in shared memory, depth by depth
//     MultiplyValues<Type>(operands_of, b, is_sum)   the same with a in registers, and b across depth
//     FenceRegisters()              before the first product of several, and after registers of them changed
//     CommitProducts(), WaitForProducts<n>()   a group of products; until all groups but the n last are done.
//                                   Until then their c means nothing, and what they read stays as it is
//     KeepProducts(c_of)            behind a wait for all: nothing that uses c may move in front of it
//   InitBarrier(barrier, count)   of `count` arrivals a phase, and of the bytes that were expected
//   Expect(barrier, bytes), Arrive(barrier)
//   CopyBulk(shared, global, bytes, barrier)      multiples of 16; tells the barrier when it is there
//   Store(t, shared, value)       16 bytes that products will read; Publish(t): the thread's stores and
//   copies
//                                 that are done may be read by products, behind a barrier
//   AddressOf(shared)             as a descriptor has it
namespace eduba::cuda {

inline constexpr int kMultiplyGroups = 2;
inline constexpr int kWarpgroupThreads = (1 + kMultiplyGroups) * kGroupThreads;
inline constexpr int kWarpgroupTileMax = kMultiplyGroups * kGroupTileRows;
// Registers of a thread, of 65536 for all: 168 at the start.
inline constexpr int kLoadRegisters = 40;
inline constexpr int kMultiplyRegisters = 232;
static_assert(kGroupThreads * (kLoadRegisters + kMultiplyGroups * kMultiplyRegisters) <= 65536);

// What a slot holds, a slice: 16 dimensions of all keys, or 32 rows of up to 128 channels.
inline constexpr int kKeySliceUnits = kTileDepth / kUnitDims;
inline constexpr int kKeyUnitBytes = kPageRows * kLoadBytes;       // 8 dimensions of all keys.
inline constexpr int kKeyPieceBytes = kKeyBlockRows * kLoadBytes;  // Of 32 keys: what the page has in one.
// 8 channels of a slice's rows. 16 bytes apart, so that a row's units meet in no bank when they are written.
inline constexpr int kGroupValueRows = 32;
inline constexpr int kGroupValueSlices = kPageRows / kGroupValueRows;
inline constexpr int kValueUnitBytes = kGroupValueRows * kLoadBytes + kLoadBytes;
inline constexpr int kGroupChannelsMax = 128;
inline constexpr int kSlotBytes = kGroupChannelsMax / kCoreRows * kValueUnitBytes;
static_assert(kSlotBytes >= kKeySliceUnits * kKeyUnitBytes);
// One in use, one that may not have been given back yet, and one on its way for each loading warp: 32 KiB, of
// an H200's 36 GB/s for a multiprocessor a microsecond's.
inline constexpr int kGroupSlotsMin = 2 + kGroupWarps;
inline constexpr int kGroupSlotsMax = 16;
inline constexpr int kQueryUnitBytes = kGroupTileRows * kLoadBytes;  // 8 dimensions of 64 queries.
inline constexpr int kHulls = 8;  // Of a group's vectors, as many for each.
// Of a group's sums: 8 vectors' words of 8 channels, two of them a lane's.
inline constexpr int kBlockVectors = 8;
struct alignas(16) WordPair {
  uint64_t word[2];
};
struct alignas(16) UnitPair {
  double unit[2];
};

// Terms of a weight. One in f16 is off by up to 2^-11 of it; one in bf16 would be by 2^-8.
template <class Type>
inline constexpr int kWeightTerms = Type::kHasFloatRange ? 2 : 1;

struct GroupShared {
  uint64_t full[kGroupSlotsMax];
  uint64_t empty[kGroupSlotsMax];
  // Each group's, 64 of them: where they take turns, the same 64 with sums of their own.
  VectorState vector[kWarpgroupTileMax];
  // What 8 vectors see lies in here, and what 64 see; what each of them sees.
  PositionRange part_hull[kMultiplyGroups * kHulls];
  PositionRange hull[kMultiplyGroups];
  PositionRange part_core[kMultiplyGroups * kHulls];
  PositionRange core[kMultiplyGroups];
  float stretch[kWarpgroupTileMax];  // As TensorRegisters.
  float shrink[kWarpgroupTileMax];
  bool seen[kPageRows];  // Rows of the page under way that some vector sees.
};
inline constexpr int kGroupSharedBytes = (sizeof(GroupShared) + 127) / 128 * 128;
// Of shared memory that a block may have on sm_90.
inline constexpr int kWarpgroupSharedMax = 227 << 10;

// How a block divides its shared memory: GroupShared, units of channels, words, queries, slots.
struct WarpgroupSpace {
  int blocks;  // Of 8 vectors, whose words each group has.
  int unit_bytes;
  int word_bytes;
  int query_bytes;  // Of each 64 vectors.
  int slots;
  int bytes;
};
constexpr WarpgroupSpace MakeWarpgroupSpace(const PageLayout& layout, int tile, int query_terms,
                                            int64_t vectors, bool is_summed) {
  WarpgroupSpace s = {};
  if (is_summed) {
    s.blocks = vectors < kGroupTileRows ? static_cast<int>((vectors + kBlockVectors - 1) / kBlockVectors)
                                        : kGroupTileRows / kBlockVectors;
    s.unit_bytes = layout.value_pitch * static_cast<int>(sizeof(double));
  }
  s.word_bytes =
      kMultiplyGroups * s.blocks * kBlockVectors * layout.value_pitch * static_cast<int>(sizeof(uint64_t));
  s.query_bytes = query_terms * layout.head_pitch / kUnitDims * kQueryUnitBytes;
  s.bytes = kGroupSharedBytes + s.unit_bytes + s.word_bytes + tile / kGroupTileRows * s.query_bytes;
  const int slots = (kWarpgroupSharedMax - s.bytes) / kSlotBytes;
  s.slots = slots < kGroupSlotsMax ? slots : kGroupSlotsMax;
  s.bytes += s.slots * kSlotBytes;
  return s;
}
constexpr WarpgroupSpace WarpgroupSpaceOf(const AttendArgs& args) {
  return MakeWarpgroupSpace(args.layout, args.tile, args.query_terms, int64_t{args.rows} * args.group,
                            args.is_summed());
}

// Query vectors of a block: as many as its shared memory holds beside enough slots; 0: it does not hold the
// fewest.
constexpr int ChooseWarpgroupTile(const PageLayout& layout, int query_terms, int64_t vectors,
                                  bool is_summed) {
  for (const int tile : {kWarpgroupTileMax, kGroupTileRows}) {
    if (tile > kGroupTileRows && vectors <= kGroupTileRows) continue;
    if (MakeWarpgroupSpace(layout, tile, query_terms, vectors, is_summed).slots >= kGroupSlotsMin) {
      return tile;
    }
  }
  return 0;
}
// Whether the kernel takes such sessions, if need be as partials. Longer keys leave no room for slots.
constexpr bool TakesWarpgroups(const PageLayout& layout) {
  return layout.element == 2 && ChooseWarpgroupTile(layout, 2, 1, false) > 0;
}

// 1 where every query is a number of the keys' type, up to a power of two (StretchOf): its low term is zero,
// and leaving it out changes no bit. Else 2.
template <class Type>
int QueryTerms(const float* queries, int64_t count) {
  uint32_t all = 0;
  uint32_t largest = 0;
  uint32_t smallest = 0xffU << 23;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint32_t>(queries[i]);
    const uint32_t size = bits & 0x7fffffffU;
    all |= bits;
    largest = size > largest ? size : largest;
    smallest = size != 0 && size < smallest ? size : smallest;
  }
  if constexpr (Type::kHasFloatRange) return (all & 0xffffU) == 0 ? 1 : 2;
  // 11 digits, and in [2^-14, 2^15) when the largest of the vector is in [2^14, 2^15).
  constexpr uint32_t kExponentMin = 31;  // StretchOf brings no less than that so far.
  const bool fits =
      largest == 0 || ((largest >> 23) - (smallest >> 23) <= 28 && smallest >> 23 >= kExponentMin);
  return (all & 0x1fffU) == 0 && fits ? 1 : 2;
}

// Channels of one pass over a page's values.
constexpr int GroupChannels(const PageLayout& layout) {
  return layout.value_pitch <= kGroupChannelsMax / 2 ? kGroupChannelsMax / 2 : kGroupChannelsMax;
}

// Of a multiplying thread. Its two rows are vectors lane / 4 and lane / 4 + 8 of its warp's 16.
template <class Type, int kPassChannels>
struct GroupRegisters {
  float s[kKeyTiles][4];  // Dot products; then weights.
  float o[kPassChannels / kTileColumns][4];
  uint32_t high[kPageRows / kTileDepth][4];  // Terms of the weights.
  uint32_t low[kWeightTerms<Type> == 2 ? kPageRows / kTileDepth : 1][4];
  float shrink[2];
  float m[2];
  float smallest[2];
  float l[2];
  float bad[2];
  KeyRange seen[2];
};

// Where the ring is: a slot, and the parity of its barriers' phase.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  EDUBA_DEVICE void Next(int slots) {
    if (++slot < slots) return;
    slot = 0;
    parity ^= 1;
  }
};

EDUBA_DEVICE PositionRange VisibleOf(const VectorState& v) {
  PositionRange visible;
  visible.begin = v.begin;
  visible.end = v.end;
  return visible;
}
// The smallest range that holds both.
EDUBA_DEVICE PositionRange HullOf(const PositionRange& a, const PositionRange& b) {
  const bool is_a = a.begin < a.end;
  const bool is_b = b.begin < b.end;
  PositionRange hull;
  hull.begin = is_a && (!is_b || a.begin < b.begin) ? a.begin : b.begin;
  hull.end = is_a && (!is_b || a.end > b.end) ? a.end : b.end;
  return hull;
}
// What lies in both.
EDUBA_DEVICE PositionRange CoreOf(const PositionRange& a, const PositionRange& b) {
  PositionRange core;
  core.begin = a.begin > b.begin ? a.begin : b.begin;
  core.end = a.end < b.end ? a.end : b.end;
  return core;
}
EDUBA_DEVICE bool SeesPage(const PositionRange& range, int64_t page) {
  return range.begin < range.end && range.begin < (page + 1) * kPageRows && range.end > page * kPageRows;
}

template <class Type, int kPassChannels, class Block>
EDUBA_DEVICE void AttendPagesWarpgroup(const Block& block, const AttendArgs& args) {
  static_assert(Type::kElement == 2);
  using Registers = GroupRegisters<Type, kPassChannels>;
  const PageLayout& layout = args.layout;
  const bool is_summed = args.is_summed();
  const WarpgroupSpace space = WarpgroupSpaceOf(args);
  auto& shared = *reinterpret_cast<GroupShared*>(block.shared());
  auto* const unit_pairs =
      reinterpret_cast<UnitPair*>(reinterpret_cast<char*>(block.shared()) + kGroupSharedBytes);
  char* const words = reinterpret_cast<char*>(unit_pairs) + space.unit_bytes;
  char* const queries = words + space.word_bytes;
  char* const slots = queries + args.tile / kGroupTileRows * space.query_bytes;
  const int slot_count = space.slots;
  typename Block::template Registers<Registers> registers(block);

  const int tile = static_cast<int>(block.index() % args.tiles);
  const int kv_head = static_cast<int>(block.index() / args.tiles % layout.kv_heads);
  const int64_t run = block.index() / args.tiles / layout.kv_heads;
  const int64_t first_slot = run * args.pages / args.runs;
  const int64_t last_slot = (run + 1) * args.pages / args.runs;
  const int64_t row_heads = int64_t{args.rows} * args.query_heads;
  const int first_vector = tile * args.tile;
  const int left = args.rows * args.group - first_vector;
  const int vectors = left < args.tile ? left : args.tile;
  // Both groups have all vectors and take turns at the pages, or each has its own.
  const bool take_turns = args.tile == kGroupTileRows;
  const int units = layout.head_pitch / kUnitDims;
  const int key_slices = units / kKeySliceUnits;
  constexpr int kPassTiles = kPassChannels / kTileColumns;
  const int passes = (layout.value_pitch + kPassChannels - 1) / kPassChannels;

  // Tiles of 8 channels that are left for a pass, or more.
  const auto tiles_of = [&](int pass) { return layout.value_pitch / kTileColumns - pass * kPassTiles; };

  block.Threads([&](int t) {
    if (t < kWarpgroupTileMax) {
      VectorState& v = shared.vector[t];
      v.begin = v.end = 0;
      v.listed = nullptr;
      v.row_head = -1;
      v.reference = 0;
      v.l = v.fault = 0;
      shared.stretch[t] = shared.shrink[t] = 1;
      const int i = take_turns ? t % kGroupTileRows : t;  // Of the tile.
      if (i < vectors) {
        const int row = (first_vector + i) / args.group;
        SetVisible(args, row, v);
        v.row_head = int64_t{row} * args.query_heads + kv_head * args.group + (first_vector + i) % args.group;
        if (is_summed) v.reference = args.reference[v.row_head];
        if constexpr (!Type::kHasFloatRange) {
          const float* const query = args.queries + v.row_head * layout.head_dim;
          float largest = 0;
          for (int d = 0; d < layout.head_dim; ++d) {
            const float size = query[d] < 0 ? -query[d] : query[d];
            largest = size > largest ? size : largest;
          }
          const int k = StretchOf(largest);
          shared.stretch[t] = FloatPowerOfTwo(k);
          shared.shrink[t] = FloatPowerOfTwo(-k);
        }
      }
    }
    if (t < slot_count) {
      block.InitBarrier(&shared.full[t], kWarpThreads);
      block.InitBarrier(&shared.empty[t], kMultiplyGroups * kGroupWarps);
    }
    for (int i = t; i < space.word_bytes / static_cast<int>(sizeof(WordPair)); i += kWarpgroupThreads) {
      reinterpret_cast<WordPair*>(words)[i] = {{0, 0}};
    }
    // The padding's sums are zeros.
    for (int c = t; is_summed && c < layout.value_pitch; c += kWarpgroupThreads) {
      unit_pairs[c / 2].unit[c % 2] =
          c < layout.value_dim ? args.unit[int64_t{kv_head} * layout.value_dim + c] : 1;
    }
  });
  // Queries in their terms, as core matrices: [64 vectors][term][8 dimensions][64][8].
  block.Threads([&](int t) {
    if (t < kMultiplyGroups * kHulls) {
      constexpr int kVectors = kGroupTileRows / kHulls;
      PositionRange hull = {0, 0};
      PositionRange core = VisibleOf(shared.vector[t * kVectors]);
      for (int i = 0; i < kVectors; ++i) {
        const PositionRange visible = VisibleOf(shared.vector[t * kVectors + i]);
        hull = HullOf(hull, visible);
        core = CoreOf(core, visible);
      }
      shared.part_hull[t] = hull;
      shared.part_core[t] = core;
    }
    for (int i = t; i < args.tile * units; i += kWarpgroupThreads) {
      const int v = i / units;
      const int unit = i % units;
      const float* const query =
          v < vectors ? args.queries + shared.vector[v].row_head * layout.head_dim : nullptr;
      Load16 high;
      Load16 low;
      EDUBA_UNROLL
      for (int j = 0; j < 4; ++j) {
        float x = QueryElement(query, unit * kUnitDims + 2 * j, layout.head_dim);
        float y = QueryElement(query, unit * kUnitDims + 2 * j + 1, layout.head_dim);
        if constexpr (!Type::kHasFloatRange) {
          x = Mul(x, shared.stretch[v]);
          y = Mul(y, shared.stretch[v]);
        }
        Split<Type>(x, y, high.word[j], low.word[j]);
      }
      char* const to = queries + v / kGroupTileRows * space.query_bytes + unit * kQueryUnitBytes +
                       v % kGroupTileRows * kLoadBytes;
      block.Store(t, to, args.query_terms == 2 ? low : high);
      if (args.query_terms == 2) block.Store(t, to + units * kQueryUnitBytes, high);
    }
    block.Publish(t);
  });

  block.Threads([&](int t) {
    if (t >= kMultiplyGroups) return;
    PositionRange hull = {0, 0};
    PositionRange core = shared.part_core[t * kHulls];
    for (int i = 0; i < kHulls; ++i) {
      hull = HullOf(hull, shared.part_hull[t * kHulls + i]);
      core = CoreOf(core, shared.part_core[t * kHulls + i]);
    }
    shared.hull[t] = hull;
    shared.core[t] = core;
  });
  const auto is_loaded = [&](int64_t page) {
    return block.Uniform(SeesPage(shared.hull[0], page) || SeesPage(shared.hull[1], page) ? 1 : 0) != 0;
  };

  const auto load = [&](const auto& group) {
    RingPlace place;
    int turn = 0;
    // Loads a slice: start(t, lane, slot, barrier) for each lane of one warp; the next slice is the next
    // warp's. So what is there is handed over whether or not there is room for more.
    const auto slice = [&](const auto& start) {
      group.Warps([&](const auto& warp) {
        if (warp.index() != turn) return;
        group.Wait(&shared.empty[place.slot], place.parity ^ 1);
        warp.Lanes([&](int lane) {
          const int t = warp.index() * kWarpThreads + lane;
          start(t, lane, slots + place.slot * kSlotBytes, &shared.full[place.slot]);
          block.CommitCopies(t);
          block.template WaitForCopies<0>(t);
          block.Publish(t);
          block.Arrive(&shared.full[place.slot]);
        });
      });
      place.Next(slot_count);
      turn = (turn + 1) % kGroupWarps;
    };
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const PageEntry page = args.page[slot];
      if (!is_loaded(page.index)) continue;
      const char* const data = static_cast<const char*>(page.data);
      // Mostly the first vector or the last sees the whole page, and all rows are seen.
      const auto sees_all = [&](int v) {
        const KeyRange seen = ListedKeys(shared.vector[v], slot, page.index);
        return page.live == nullptr && seen.begin == 0 && seen.end == kPageRows;
      };
      const bool all_seen = block.Uniform(sees_all(0) || sees_all(vectors - 1) ? 1 : 0) != 0;
      if (!all_seen) {
        group.Sync();  // Until all have done with the page before.
        group.Threads([&](int t) {
          for (int row = t; row < kPageRows; row += kGroupThreads) {
            bool is_seen = false;
            for (int v = 0; v < vectors && !is_seen; ++v) {
              const KeyRange keys = ListedKeys(shared.vector[v], slot, page.index);
              is_seen = row >= keys.begin && row < keys.end;
            }
            shared.seen[row] = is_seen && IsLive(page, row);
          }
        });
        group.Sync();
      }
      // Keys that nobody sees may be anything: so are their logits, which nobody uses.
      for (int s = 0; s < key_slices; ++s) {
        slice([&](int /*t*/, int lane, char* to, uint64_t* barrier) {
          if (lane == 0) block.Expect(barrier, kKeySliceUnits * kKeyUnitBytes);
          constexpr int kPieces = kPageRows / kKeyBlockRows;
          static_assert(kKeySliceUnits * kPieces <= kWarpThreads);
          if (lane >= kKeySliceUnits * kPieces) return;
          const int unit = lane / kPieces;
          const int piece = lane % kPieces;
          block.CopyBulk(
              to + unit * kKeyUnitBytes + piece * kKeyPieceBytes,
              data + layout.key(kv_head, piece * kKeyBlockRows, (s * kKeySliceUnits + unit) * kUnitDims) *
                         Type::kElement,
              kKeyPieceBytes, barrier);
        });
      }
      // A row of values that nobody sees counts as zeros, which its weight is as well. Channels behind the
      // last may be anything: so are their sums, which nobody stores.
      for (int s = 0; s < passes * kGroupValueSlices; ++s) {
        const int first_channel = s / kGroupValueSlices * kPassChannels;
        const int first_row = s % kGroupValueSlices * kGroupValueRows;
        slice([&](int t, int lane, char* to, uint64_t* /*barrier*/) {
          constexpr int kUnits = kPassChannels / kCoreRows;
          constexpr int kRows = kWarpThreads / kUnits;  // At a time.
          const int unit = lane % kUnits;
          const int channel = first_channel + unit * kCoreRows;
          if (channel >= layout.value_pitch) return;
          int row = lane / kUnits;
          const char* from = data + layout.value(kv_head, first_row + row, channel) * Type::kElement;
          for (; row < kGroupValueRows; row += kRows) {
            block.CopyAsync(t, to + unit * kValueUnitBytes + row * kLoadBytes, from,
                            all_seen || shared.seen[first_row + row]);
            from += int64_t{kRows} * layout.value_pitch * Type::kElement;
          }
        });
      }
    }
  };

  const auto multiply = [&](const auto& group) {
    const int mine = group.index() - 1;
    const int first_thread = group.index() * kGroupThreads;
    const auto registers_at = [&](const auto& warp, int lane) -> Registers& {
      return registers[first_thread + warp.index() * kWarpThreads + lane];
    };
    const auto vector_of = [&](const auto& warp, int lane, int i) -> VectorState& {
      return shared.vector[mine * kGroupTileRows + warp.index() * kTileRows + 8 * i + lane / 4];
    };
    // The group's words of a lane's vector i, 8 channels a tile.
    const auto words_of = [&](const auto& warp, int lane, int i, int channel_tile) -> WordPair& {
      const int block_of_vectors = mine * space.blocks + 2 * warp.index() + i;
      return reinterpret_cast<WordPair*>(
          words)[(block_of_vectors * (layout.value_pitch / kTileColumns) + channel_tile) * kWarpThreads +
                 lane];
    };
    const auto s_of = [&](int t) -> float(&)[kKeyTiles][4] { return registers[first_thread + t].s; };
    const auto o_of = [&](int t) -> float(&)[kPassChannels / kTileColumns][4] {
      return registers[first_thread + t].o;
    };
    // What a pass over a page adds to the words of a lane's vector i. A few tiles are read before the first
    // of them is written, so that their arithmetic can overlap: a group has but one warp for each scheduler.
    const auto add_words = [&](const auto& warp, int lane, int i, int pass, double weight, double bound) {
      Registers& r = registers_at(warp, lane);
      const auto add_tiles = [&]<int kTiles>(int first) {
        UnitPair unit[kTiles];
        WordPair sum[kTiles];
        EDUBA_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          const int tile_of_head = pass * kPassTiles + first + n;
          unit[n] = unit_pairs[tile_of_head * (kTileColumns / 2) + lane % 4];
          sum[n] = words_of(warp, lane, i, tile_of_head);
        }
        EDUBA_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          EDUBA_UNROLL
          for (int e = 0; e < 2; ++e) {
            const float x = Unshifted<Type>(r.o[first + n][2 * i + e]);
            if (!AddWord(x, weight, unit[n].unit[e], bound, sum[n].word[e])) r.bad[i] = 1;
          }
        }
        EDUBA_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          words_of(warp, lane, i, pass * kPassTiles + first + n) = sum[n];
        }
      };
      if (tiles_of(pass) >= kPassTiles) {
        constexpr int kTiles = 4;
        EDUBA_UNROLL
        for (int first = 0; first < kPassTiles; first += kTiles) add_tiles.template operator()<kTiles>(first);
      } else {
        EDUBA_UNROLL
        for (int first = 0; first < kPassTiles; ++first) {
          if (first < tiles_of(pass)) add_tiles.template operator()<1>(first);
        }
      }
    };
    group.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          registers_at(warp, lane).shrink[i] =
              shared.shrink[mine * kGroupTileRows + warp.index() * kTileRows + 8 * i + lane / 4];
        }
      });
    });
    const char* const query = queries + (take_turns ? 0 : mine) * space.query_bytes;
    RingPlace place;
    int turn = 0;
    const auto wait = [&] { group.Wait(&shared.full[place.slot], place.parity); };
    const auto give_back = [&](int slot) {
      group.Threads([&](int t) {
        if (t % kWarpThreads == 0) block.Arrive(&shared.empty[slot]);
      });
    };
    const auto before = [&] { return (place.slot == 0 ? slot_count : place.slot) - 1; };
    // Behind the last slice of several.
    const auto finish = [&] {
      group.template WaitForProducts<0>();
      give_back(before());
    };

    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const PageEntry page = args.page[slot];
      const bool comes = is_loaded(page.index);
      const bool is_seen = block.Uniform(SeesPage(shared.hull[mine], page.index) ? 1 : 0) != 0;
      const PositionRange core = shared.core[mine];
      const bool all_seen =
          args.whole_lists &&
          block.Uniform(
              core.begin <= page.index * kPageRows && core.end >= (page.index + 1) * kPageRows ? 1 : 0) != 0;
      const bool is_mine = !take_turns || turn % kMultiplyGroups == mine;
      if (comes) ++turn;
      if (!is_seen && is_mine && !is_summed) {
        group.Threads([&](int t) {
          if (t >= kGroupTileRows) return;
          const int64_t row_head = shared.vector[mine * kGroupTileRows + t].row_head;
          if (row_head < 0) return;
          args.m[slot * row_heads + row_head] = -Infinity();
          args.l[slot * row_heads + row_head] = 0;
        });
      }
      if (!is_seen || !is_mine) {
        // Every group takes part in every phase of a barrier: a parity tells a phase from the next one only.
        for (int s = 0; comes && s < key_slices + passes * kGroupValueSlices; ++s) {
          wait();
          give_back(place.slot);
          place.Next(slot_count);
        }
        continue;
      }

      // 16 dimensions. For each number of terms by itself: products have to stand in one line for the
      // compiler.
      const auto multiply_keys = [&]<int kTerms, bool kIsSum>(int s) {
        wait();
        const uint32_t keys = block.AddressOf(slots + place.slot * kSlotBytes);
        group.FenceRegisters();
        EDUBA_UNROLL
        for (int term = 0; term < kTerms; ++term) {
          group.template MultiplyKeys<Type>(
              s_of,
              MatrixDescriptor(block.AddressOf(query + (term * units + s * kKeySliceUnits) * kQueryUnitBytes),
                               kQueryUnitBytes, kCoreBytes),
              MatrixDescriptor(keys, kKeyUnitBytes, kCoreBytes), kIsSum || term > 0);
        }
        group.CommitProducts();
        if constexpr (kIsSum) {
          group.template WaitForProducts<1>();
          give_back(before());
        }
        place.Next(slot_count);
      };
      const auto multiply_all_keys = [&]<int kTerms>() {
        multiply_keys.template operator()<kTerms, false>(0);
        for (int s = 1; s < key_slices; ++s) multiply_keys.template operator()<kTerms, true>(s);
      };
      if (args.query_terms == 2) {
        multiply_all_keys.template operator()<2>();
      } else {
        multiply_all_keys.template operator()<1>();
      }
      finish();
      group.KeepProducts(s_of);

      group.Warps([&](const auto& warp) {
        const auto registers_of = [&](int lane) -> Registers& { return registers_at(warp, lane); };
        warp.Lanes([&](int lane) {
          EDUBA_UNROLL
          for (int i = 0; i < 2; ++i) {
            registers_of(lane).seen[i] = KeysSeen(vector_of(warp, lane, i), slot, page);
          }
        });
        WeighKeys<Type>(
            warp, args, registers_of, [&](int lane, int i) { return registers_of(lane).seen[i]; }, page.live,
            all_seen);
        // Two tiles of 8 keys as c are one of 16 keys as a.
        warp.Lanes([&](int lane) {
          Registers& r = registers_of(lane);
          EDUBA_UNROLL
          for (int step = 0; step < kPageRows / kTileDepth; ++step) {
            EDUBA_UNROLL
            for (int j = 0; j < 4; ++j) {
              const float x = r.s[2 * step + j / 2][j % 2 * 2];
              const float y = r.s[2 * step + j / 2][j % 2 * 2 + 1];
              if constexpr (kWeightTerms<Type> == 2) {
                Split<Type>(x, y, r.high[step][j], r.low[step][j]);
              } else {
                r.high[step][j] = Type::Pack(x, y);
              }
            }
          }
        });
        // Lanes 0 and 1 of four look after the vectors that the four share.
        if (is_summed) {
          warp.Sync();
          warp.Lanes([&](int lane) {
            const int i = lane % 4;
            if (i >= 2) return;
            const Registers& r = registers_of(lane);
            const bool is_first = i == 0;
            const KeyRange seen = is_first ? r.seen[0] : r.seen[1];
            const float l = is_first ? r.l[0] : r.l[1];
            TakePage(args, page.index, seen.begin < seen.end,
                     (is_first ? r.bad[0] : r.bad[1]) == 0 && IsFinite(l), is_first ? r.m[0] : r.m[1], l,
                     vector_of(warp, lane, i));
          });
          warp.Sync();
        }
      });

      for (int pass = 0; pass < passes; ++pass) {
        EDUBA_UNROLL
        for (int part = 0; part < kGroupValueSlices; ++part) {
          wait();
          group.FenceRegisters();
          const uint32_t values = block.AddressOf(slots + place.slot * kSlotBytes);
          EDUBA_UNROLL
          for (int i = 0; i < kGroupValueRows / kTileDepth; ++i) {
            const int step = part * (kGroupValueRows / kTileDepth) + i;
            const uint64_t b =
                MatrixDescriptor(values + i * kTileDepth * kLoadBytes, kCoreBytes, kValueUnitBytes);
            if constexpr (kWeightTerms<Type> == 2) {
              group.template MultiplyValues<Type>(
                  [&](int t) {
                    Registers& r = registers[first_thread + t];
                    return GroupOperands<kPassChannels / kTileColumns>{r.o, r.low[step]};
                  },
                  b, step > 0);
            }
            group.template MultiplyValues<Type>(
                [&](int t) {
                  Registers& r = registers[first_thread + t];
                  return GroupOperands<kPassChannels / kTileColumns>{r.o, r.high[step]};
                },
                b, step > 0 || kWeightTerms<Type> == 2);
          }
          group.CommitProducts();
          if (part > 0) {
            group.template WaitForProducts<1>();
            give_back(before());
          }
          place.Next(slot_count);
        }
        finish();
        group.KeepProducts(o_of);
        group.Warps([&](const auto& warp) {
          warp.Lanes([&](int lane) {
            Registers& r = registers_at(warp, lane);
            EDUBA_UNROLL
            for (int i = 0; i < 2; ++i) {
              if (r.seen[i].begin >= r.seen[i].end) continue;
              const VectorState& v = vector_of(warp, lane, i);
              if (is_summed && v.bound >= 0) {
                add_words(warp, lane, i, pass, v.weight, v.bound);
                continue;
              }
              float* const to = args.o + (slot * row_heads + v.row_head) * layout.value_pitch +
                                pass * kPassChannels + lane % 4 * 2;
              EDUBA_UNROLL
              for (int n = 0; n < kPassTiles; ++n) {
                if (n >= tiles_of(pass)) continue;
                const float x = Unshifted<Type>(r.o[n][2 * i]);
                const float y = Unshifted<Type>(r.o[n][2 * i + 1]);
                if (!IsFinite(x) || !IsFinite(y)) r.bad[i] = 1;
                if (!is_summed) StorePair(to + n * kTileColumns, x, y);
              }
            }
          });
        });
      }

      group.Warps([&](const auto& warp) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          warp.QuadMax([&](int lane) -> float& { return registers_at(warp, lane).bad[i]; });
          warp.Lanes([&](int lane) {
            const Registers& r = registers_at(warp, lane);
            VectorState& v = vector_of(warp, lane, i);
            const bool sees_keys = r.seen[i].begin < r.seen[i].end;
            const bool is_good = r.bad[i] == 0 && IsFinite(r.l[i]);
            if (lane % 4 != i || v.row_head < 0) return;
            if (is_summed) {
              if (sees_keys && !is_good) FailPage(args, page.index, v);
            } else {
              KeepTotals(args, slot, page.index, v.row_head, sees_keys, is_good, r.m[i], r.l[i]);
            }
          });
        }
      });
    }

    if (!is_summed) return;
    group.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const VectorState& v = vector_of(warp, lane, i);
          if (v.row_head < 0) continue;
          uint64_t* const to = args.words + v.row_head * (layout.value_dim + 2);
          for (int n = 0; n < layout.value_pitch / kTileColumns; ++n) {
            const WordPair pair = words_of(warp, lane, i, n);
            const int channel = n * kTileColumns + lane % 4 * 2;
            if (channel < layout.value_dim && pair.word[0] != 0) AtomicAdd(&to[channel], pair.word[0]);
            if (channel + 1 < layout.value_dim && pair.word[1] != 0) {
              AtomicAdd(&to[channel + 1], pair.word[1]);
            }
          }
          if (lane % 4 == i) AddToTotal(to + layout.value_dim, v.l, v.fault != 0, args.limit);
        }
      });
    });
  };

  block.Groups([&](const auto& group) {
    if (group.index() == 0) {
      group.template GiveRegisters<kLoadRegisters>();
      load(group);
    } else {
      group.template TakeRegisters<kMultiplyRegisters>();
      multiply(group);
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_
