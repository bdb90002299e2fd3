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
// bytes, which can leave out rows that nobody sees. The others multiply: each takes 64 query vectors, or,
// where there are no more than 64, every other page. What is loaded goes through a ring of slots, each with
// two barriers: `full` when it may be read, `empty` when it may be written.
//
// A multiplying thread has the logits of two vectors with all keys of a page: 128 registers. So the maximum
// is known before the first weight, nothing is rescaled, and the sequence of products is the page's: 16
// dimensions at a time for all its keys, then 16 keys at a time for up to 128 channels.
//
// Beyond what page_tensor.h asks of a Block, and all of it so that a host can play it (emulated_warpgroup.h):
//   Uniform(x)                    x, which all threads of a warp have alike: the compiler cannot know
//   Groups(f)                     f(group) for each warpgroup, all at the same time; a group has
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

// What a slot holds, a slice: 32 dimensions of all keys, or 64 rows of up to 128 channels.
inline constexpr int kKeySliceUnits = 4;                           // Of 8 dimensions.
inline constexpr int kKeyUnitBytes = kPageRows * kLoadBytes;       // 8 dimensions of all keys.
inline constexpr int kKeyPieceBytes = kKeyBlockRows * kLoadBytes;  // Of 32 keys: what the page has in one.
// 8 channels of a slice's rows. 16 bytes apart, so that a row's units meet in no bank when they are written.
inline constexpr int kValueUnitBytes = kValueRows * kLoadBytes + kLoadBytes;
inline constexpr int kGroupChannelsMax = 128;
inline constexpr int kSlotBytes = kGroupChannelsMax / kCoreRows * kValueUnitBytes;
static_assert(kSlotBytes >= kKeySliceUnits * kKeyUnitBytes);
inline constexpr int kGroupSlotsMin = 4;
inline constexpr int kGroupSlotsMax = 8;
// Slices that a loading thread starts before it waits for the first. Two slots less than there are: while a
// group waits for a slice, the slice before it may not have been given back.
inline constexpr int kSlicesAhead = kGroupSlotsMin - 2;
// 8 dimensions of 64 queries, and both terms of 64 queries for each dimension.
inline constexpr int kQueryUnitBytes = kGroupTileRows * kLoadBytes;
inline constexpr int kQueryDimBytes = 2 * kQueryUnitBytes / kUnitDims;
inline constexpr int kHulls = 8;  // Of a group's vectors, as many for each.

// Terms of a weight. One in f16 is off by up to 2^-11 of it; one in bf16 would be by 2^-8.
template <class Type>
inline constexpr int kWeightTerms = Type::kHasFloatRange ? 2 : 1;

struct GroupShared {
  uint64_t full[kGroupSlotsMax];
  uint64_t empty[kGroupSlotsMax];
  PositionRange visible[kWarpgroupTileMax];  // Of each vector.
  // What 8 vectors see lies in here, and what 64 see; what each of them sees.
  PositionRange part_hull[kMultiplyGroups * kHulls];
  PositionRange hull[kMultiplyGroups];
  PositionRange part_core[kMultiplyGroups * kHulls];
  PositionRange core[kMultiplyGroups];
  float stretch[kWarpgroupTileMax];  // As TensorRegisters.
  float shrink[kWarpgroupTileMax];
  int has_low[kMultiplyGroups];  // Of 64 vectors: a query is not what its high term is.
  bool seen[kPageRows];          // Rows of the page under way that some vector sees.
};
inline constexpr int kGroupSharedBytes = (sizeof(GroupShared) + 127) / 128 * 128;
// Of shared memory that a block may have on sm_90.
inline constexpr int kWarpgroupSharedMax = 227 << 10;

constexpr int GroupQueryBytes(const PageLayout& layout, int tile) {
  return tile / kGroupTileRows * layout.head_pitch * kQueryDimBytes;
}
constexpr int GroupSlots(const PageLayout& layout, int tile) {
  const int slots = (kWarpgroupSharedMax - kGroupSharedBytes - GroupQueryBytes(layout, tile)) / kSlotBytes;
  return slots < kGroupSlotsMax ? slots : kGroupSlotsMax;
}
constexpr int WarpgroupSharedBytes(const PageLayout& layout, int tile) {
  return kGroupSharedBytes + GroupQueryBytes(layout, tile) + GroupSlots(layout, tile) * kSlotBytes;
}
// Whether the kernel takes such sessions, and how many vectors at most. Longer keys leave no room for slots.
constexpr bool TakesWarpgroups(const PageLayout& layout) {
  return layout.element == 2 && GroupSlots(layout, kGroupTileRows) >= kGroupSlotsMin;
}
constexpr int WarpgroupTile(const PageLayout& layout, int64_t vectors) {
  return vectors > kGroupTileRows && GroupSlots(layout, kWarpgroupTileMax) >= kGroupSlotsMin
             ? kWarpgroupTileMax
             : kGroupTileRows;
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

EDUBA_DEVICE KeyRange KeysSeen(const PositionRange& visible, int64_t page) {
  const int64_t from = visible.begin - page * kPageRows;
  const int64_t to = visible.end - page * kPageRows;
  const int64_t first = from < 0 ? 0 : from;
  const int64_t last = to > kPageRows ? int64_t{kPageRows} : to;
  if (first >= last) return {0, 0};
  return {static_cast<int>(first), static_cast<int>(last)};
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
  auto& shared = *reinterpret_cast<GroupShared*>(block.shared());
  char* const queries = reinterpret_cast<char*>(block.shared()) + kGroupSharedBytes;
  char* const slots = queries + GroupQueryBytes(layout, args.tile);
  const int slot_count = GroupSlots(layout, args.tile);
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
  const auto row_head_of = [&](int v) {
    return int64_t{(first_vector + v) / args.group} * args.query_heads + kv_head * args.group +
           (first_vector + v) % args.group;
  };
  // Both groups have all vectors and take turns at the pages, or each has its own.
  const bool take_turns = args.tile == kGroupTileRows;
  const int units = layout.head_pitch / kUnitDims;
  const int key_slices = (units + kKeySliceUnits - 1) / kKeySliceUnits;
  const int passes = (layout.value_pitch + kPassChannels - 1) / kPassChannels;

  block.Threads([&](int t) {
    if (t < kWarpgroupTileMax) {
      shared.visible[t] = {0, 0};
      shared.stretch[t] = shared.shrink[t] = 1;
      if (t < vectors) {
        shared.visible[t] = args.visible[(first_vector + t) / args.group];
        if constexpr (!Type::kHasFloatRange) {
          const float* const query = args.queries + row_head_of(t) * layout.head_dim;
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
    if (t < kMultiplyGroups) shared.has_low[t] = 0;
    if (t < slot_count) {
      block.InitBarrier(&shared.full[t], kGroupThreads);
      block.InitBarrier(&shared.empty[t], kMultiplyGroups * kGroupWarps);
    }
  });
  // Queries in two terms, as core matrices: [64 vectors][term][8 dimensions][64][8].
  block.Threads([&](int t) {
    if (t < kMultiplyGroups * kHulls) {
      constexpr int kVectors = kGroupTileRows / kHulls;
      PositionRange hull = {0, 0};
      PositionRange core = shared.visible[t * kVectors];
      for (int i = 0; i < kVectors; ++i) {
        hull = HullOf(hull, shared.visible[t * kVectors + i]);
        core = CoreOf(core, shared.visible[t * kVectors + i]);
      }
      shared.part_hull[t] = hull;
      shared.part_core[t] = core;
    }
    for (int i = t; i < args.tile * units; i += kWarpgroupThreads) {
      const int v = i / units;
      const int unit = i % units;
      const float* const query = v < vectors ? args.queries + row_head_of(v) * layout.head_dim : nullptr;
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
      const int group = v / kGroupTileRows;
      char* const to = queries + group * GroupQueryBytes(layout, kGroupTileRows) + unit * kQueryUnitBytes +
                       v % kGroupTileRows * kLoadBytes;
      block.Store(t, to, low);
      block.Store(t, to + units * kQueryUnitBytes, high);
      if ((low.word[0] | low.word[1] | low.word[2] | low.word[3]) != 0) shared.has_low[group] = 1;
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
    RingPlace started;  // The first slice that has not been handed over.
    int ahead = 0;      // Slices from there to `place`.
    // Starts a slice: start(t, slot, barrier) for each thread. Hands over the slice before, or before that.
    const auto slice = [&](const auto& start) {
      group.Wait(&shared.empty[place.slot], place.parity ^ 1);
      group.Threads([&](int t) {
        start(t, slots + place.slot * kSlotBytes, &shared.full[place.slot]);
        block.CommitCopies(t);
      });
      place.Next(slot_count);
      if (++ahead <= kSlicesAhead) return;
      group.Threads([&](int t) {
        block.template WaitForCopies<kSlicesAhead>(t);
        block.Publish(t);
        block.Arrive(&shared.full[started.slot]);
      });
      started.Next(slot_count);
      --ahead;
    };
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const PageEntry page = args.page[slot];
      if (!is_loaded(page.index)) continue;
      const char* const data = static_cast<const char*>(page.data);
      // Mostly the first vector or the last sees the whole page, and all rows are seen.
      const auto sees_all = [&](int v) {
        const KeyRange seen = KeysSeen(shared.visible[v], page.index);
        return seen.begin == 0 && seen.end == kPageRows;
      };
      const bool all_seen = block.Uniform(sees_all(0) || sees_all(vectors - 1) ? 1 : 0) != 0;
      if (!all_seen) {
        group.Sync();  // Until all have done with the page before.
        group.Threads([&](int t) {
          for (int row = t; row < kPageRows; row += kGroupThreads) {
            const int64_t position = page.index * kPageRows + row;
            bool is_seen = false;
            for (int v = 0; v < vectors && !is_seen; ++v) {
              is_seen = position >= shared.visible[v].begin && position < shared.visible[v].end;
            }
            shared.seen[row] = is_seen;
          }
        });
        group.Sync();
      }
      // Keys that nobody sees may be anything: so are their logits, which nobody uses.
      for (int s = 0; s < key_slices; ++s) {
        const int first = s * kKeySliceUnits;
        const int count = units - first < kKeySliceUnits ? units - first : kKeySliceUnits;
        slice([&](int t, char* to, uint64_t* barrier) {
          if (t == 0) block.Expect(barrier, count * kKeyUnitBytes);
          constexpr int kPieces = kPageRows / kKeyBlockRows;
          if (t >= count * kPieces) return;
          const int unit = t / kPieces;
          const int piece = t % kPieces;
          block.CopyBulk(
              to + unit * kKeyUnitBytes + piece * kKeyPieceBytes,
              data + layout.key(kv_head, piece * kKeyBlockRows, (first + unit) * kUnitDims) * Type::kElement,
              kKeyPieceBytes, barrier);
        });
      }
      // A row of values that nobody sees counts as zeros, which its weight is as well. Channels behind the
      // last may be anything: so are their sums, which nobody stores.
      for (int s = 0; s < passes * kValueSlices; ++s) {
        const int first_channel = s / kValueSlices * kPassChannels;
        const int first_row = s % kValueSlices * kValueRows;
        slice([&](int t, char* to, uint64_t* /*barrier*/) {
          constexpr int kUnits = kPassChannels / kCoreRows;
          EDUBA_UNROLL
          for (int i = 0; i < kValueRows * kUnits / kGroupThreads; ++i) {
            const int row = (t + i * kGroupThreads) / kUnits;
            const int unit = (t + i * kGroupThreads) % kUnits;
            const int channel = first_channel + unit * kCoreRows;
            if (channel >= layout.value_pitch) continue;
            block.CopyAsync(t, to + unit * kValueUnitBytes + row * kLoadBytes,
                            data + layout.value(kv_head, first_row + row, channel) * Type::kElement,
                            all_seen || shared.seen[first_row + row]);
          }
        });
      }
    }
    group.Threads([&](int t) {
      block.template WaitForCopies<0>(t);
      block.Publish(t);
    });
    for (; ahead > 0; --ahead, started.Next(slot_count)) {
      group.Threads([&](int /*t*/) { block.Arrive(&shared.full[started.slot]); });
    }
  };

  const auto multiply = [&](const auto& group) {
    const int mine = group.index() - 1;
    const int first = take_turns ? 0 : mine * kGroupTileRows;  // Of the tile's vectors.
    const int first_thread = group.index() * kGroupThreads;
    const auto vector_of = [&](int warp, int lane, int i) {
      return first + warp * kTileRows + lane / 4 + 8 * i;
    };
    const auto s_of = [&](int t) -> float(&)[kKeyTiles][4] { return registers[first_thread + t].s; };
    const auto o_of = [&](int t) -> float(&)[kPassChannels / kTileColumns][4] {
      return registers[first_thread + t].o;
    };
    group.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        Registers& r = registers[first_thread + warp.index() * kWarpThreads + lane];
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) r.shrink[i] = shared.shrink[vector_of(warp.index(), lane, i)];
      });
    });
    // A tile whose queries are 16-bit numbers has no low terms: their products would add nothing.
    const bool has_low = block.Uniform(shared.has_low[take_turns ? 0 : mine]) != 0;
    const char* const query = queries + (take_turns ? 0 : mine) * GroupQueryBytes(layout, kGroupTileRows);
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
      const bool is_seen =
          block.Uniform(SeesPage(shared.hull[take_turns ? 0 : mine], page.index) ? 1 : 0) != 0;
      const PositionRange core = shared.core[take_turns ? 0 : mine];
      const bool all_seen =
          block.Uniform(
              core.begin <= page.index * kPageRows && core.end >= (page.index + 1) * kPageRows ? 1 : 0) != 0;
      const bool is_mine = !take_turns || turn % kMultiplyGroups == mine;
      if (comes) ++turn;
      if (!is_seen && is_mine) {
        group.Threads([&](int t) {
          const int v = first + t;
          if (t >= kGroupTileRows || v >= vectors) return;
          args.m[slot * row_heads + row_head_of(v)] = -Infinity();
          args.l[slot * row_heads + row_head_of(v)] = 0;
        });
      }
      if (!is_seen || !is_mine) {
        // Every group takes part in every phase of a barrier: a parity tells a phase from the next one only.
        for (int s = 0; comes && s < key_slices + passes * kValueSlices; ++s) {
          wait();
          give_back(place.slot);
          place.Next(slot_count);
        }
        continue;
      }

      // 16 dimensions. For each number of terms by itself: products have to stand in one line for the
      // compiler.
      const auto multiply_keys = [&]<int kTerms, bool kIsSum>(int unit) {
        const bool is_first = unit % kKeySliceUnits == 0;  // Of a slice.
        if (is_first) wait();
        const uint32_t keys = block.AddressOf(slots + place.slot * kSlotBytes);
        group.FenceRegisters();
        EDUBA_UNROLL
        for (int term = 2 - kTerms; term < 2; ++term) {
          group.template MultiplyKeys<Type>(
              s_of,
              MatrixDescriptor(block.AddressOf(query + (term * units + unit) * kQueryUnitBytes),
                               kQueryUnitBytes, kCoreBytes),
              MatrixDescriptor(keys + unit % kKeySliceUnits * kKeyUnitBytes, kKeyUnitBytes, kCoreBytes),
              kIsSum || term > 2 - kTerms);
        }
        group.CommitProducts();
        group.template WaitForProducts<1>();
        if (is_first && unit > 0) give_back(before());
        if (!is_first || unit + 2 == units) place.Next(slot_count);
      };
      const auto multiply_all_keys = [&]<int kTerms>() {
        multiply_keys.template operator()<kTerms, false>(0);
        for (int unit = 2; unit < units; unit += 2) multiply_keys.template operator()<kTerms, true>(unit);
      };
      if (has_low) {
        multiply_all_keys.template operator()<2>();
      } else {
        multiply_all_keys.template operator()<1>();
      }
      finish();
      group.KeepProducts(s_of);

      group.Warps([&](const auto& warp) {
        const auto registers_of = [&](int lane) -> Registers& {
          return registers[first_thread + warp.index() * kWarpThreads + lane];
        };
        warp.Lanes([&](int lane) {
          Registers& r = registers_of(lane);
          EDUBA_UNROLL
          for (int i = 0; i < 2; ++i) {
            r.seen[i] = KeysSeen(shared.visible[vector_of(warp.index(), lane, i)], page.index);
          }
        });
        WeighKeys<Type>(
            warp, args, registers_of, [&](int lane, int i) { return registers_of(lane).seen[i]; }, all_seen);
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
      });

      for (int pass = 0; pass < passes; ++pass) {
        EDUBA_UNROLL
        for (int part = 0; part < kValueSlices; ++part) {
          wait();
          group.FenceRegisters();
          const uint32_t values = block.AddressOf(slots + place.slot * kSlotBytes);
          EDUBA_UNROLL
          for (int i = 0; i < kValueRows / kTileDepth; ++i) {
            const int step = part * (kValueRows / kTileDepth) + i;
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
            Registers& r = registers[first_thread + warp.index() * kWarpThreads + lane];
            EDUBA_UNROLL
            for (int i = 0; i < 2; ++i) {
              if (r.seen[i].begin >= r.seen[i].end) continue;
              const int channel = pass * kPassChannels + lane % 4 * 2;
              float* const to =
                  args.o +
                  (slot * row_heads + row_head_of(vector_of(warp.index(), lane, i))) * layout.value_pitch +
                  channel;
              EDUBA_UNROLL
              for (int n = 0; n < kPassChannels / kTileColumns; ++n) {
                if (channel + n * kTileColumns >= layout.value_pitch) continue;
                const float x = Unshifted<Type>(r.o[n][2 * i]);
                const float y = Unshifted<Type>(r.o[n][2 * i + 1]);
                if (!IsFinite(x) || !IsFinite(y)) r.bad[i] = 1;
                StorePair(to + n * kTileColumns, x, y);
              }
            }
          });
        });
      }

      group.Warps([&](const auto& warp) {
        const auto registers_of = [&](int lane) -> Registers& {
          return registers[first_thread + warp.index() * kWarpThreads + lane];
        };
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          warp.QuadMax([&](int lane) -> float& { return registers_of(lane).bad[i]; });
          warp.Lanes([&](int lane) {
            const Registers& r = registers_of(lane);
            const int v = vector_of(warp.index(), lane, i);
            if (lane % 4 != 0 || v >= vectors) return;
            KeepTotals(args, slot, page.index, row_head_of(v), r.seen[i].begin < r.seen[i].end,
                       r.bad[i] == 0 && IsFinite(r.l[i]), r.m[i], r.l[i]);
          });
        }
      });
    }
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
