#ifndef EDUBA_KERNELS_CUDA_WARPGROUP_SPACE_H_
#define EDUBA_KERNELS_CUDA_WARPGROUP_SPACE_H_

#include <bit>
#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/cuda/page_tensor.h"

// How a block of page_warpgroup.h divides its shared memory and registers, and small parts that its groups
// share.
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
inline constexpr int kKeyUnitBytes = kPageRows * kLoadBytes;  // 8 dimensions of all keys.
// 8 dimensions of 32 keys, which lie together in the page.
inline constexpr int kKeyPieceBytes = kKeyBlockRows * kLoadBytes;
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
// Parts of a group's vectors, as many vectors in each, whose hulls are found at once.
inline constexpr int kHulls = 8;
// A block of a group's sums: 8 vectors' words of 8 channels. Each lane has two of them.
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
  float stretch[kWarpgroupTileMax];  // Means what TensorRegisters::stretch means.
  float shrink[kWarpgroupTileMax];
  bool seen[kPageRows];  // Rows of the page under way that some vector sees.
};
inline constexpr int kGroupSharedBytes = (sizeof(GroupShared) + 127) / 128 * 128;
// The bytes of shared memory that a block may have on sm_90.
inline constexpr int kWarpgroupSharedMax = 227 << 10;

// How a block divides its shared memory: GroupShared, units of channels, words, queries, slots.
struct WarpgroupSpace {
  int blocks;  // Blocks of 8 vectors, whose words each group has.
  int unit_bytes;
  int word_bytes;
  int query_bytes;  // The bytes of each 64 vectors.
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

// A multiplying thread's registers. Its two rows are vectors lane / 4 and lane / 4 + 8 of its warp's 16.
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

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_WARPGROUP_SPACE_H_
