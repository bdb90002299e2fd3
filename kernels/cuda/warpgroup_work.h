#ifndef EDUBA_KERNELS_CUDA_WARPGROUP_WORK_H_
#define EDUBA_KERNELS_CUDA_WARPGROUP_WORK_H_

#include <cstdint>

#include "base/pages.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/cuda/page_tensor.h"
#include "kernels/cuda/warpgroup_space.h"

namespace eduba::cuda {

// One block's work: a tile of query vectors against one KV head of a run of pages. It prepares what its
// groups share.
template <class TheType, int kChannelsOfAPass, class TheBlock>
class WarpgroupWork {
 public:
  using Type = TheType;
  using Block = TheBlock;
  static constexpr int kPassChannels = kChannelsOfAPass;
  static constexpr int kPassTiles = kPassChannels / kTileColumns;
  using ThreadRegisters = GroupRegisters<Type, kPassChannels>;
  using Registers = typename Block::template Registers<ThreadRegisters>;

  // All outlive the object; `registers` is the threads' own.
  EDUBA_DEVICE WarpgroupWork(const Block& the_block, const AttendArgs& the_args, Registers& the_registers)
      : block(the_block),
        args(the_args),
        layout(the_args.layout),
        registers(the_registers),
        is_summed(the_args.is_summed()),
        space(WarpgroupSpaceOf(the_args)),
        shared(*reinterpret_cast<GroupShared*>(the_block.shared())),
        unit_pairs(
            reinterpret_cast<UnitPair*>(reinterpret_cast<char*>(the_block.shared()) + kGroupSharedBytes)),
        words(reinterpret_cast<char*>(unit_pairs) + space.unit_bytes),
        queries(words + space.word_bytes),
        slots(queries + the_args.tile / kGroupTileRows * space.query_bytes),
        kv_head(static_cast<int>(the_block.index() / the_args.tiles % layout.kv_heads)),
        first_slot(the_block.index() / the_args.tiles / layout.kv_heads * the_args.pages / the_args.runs),
        last_slot((the_block.index() / the_args.tiles / layout.kv_heads + 1) * the_args.pages /
                  the_args.runs),
        row_heads(int64_t{the_args.rows} * the_args.query_heads),
        first_vector(static_cast<int>(the_block.index() % the_args.tiles) * the_args.tile),
        vectors(Smaller(the_args.rows * the_args.group - first_vector, the_args.tile)),
        take_turns(the_args.tile == kGroupTileRows),
        units(layout.head_pitch / kUnitDims),
        key_slices(units / kKeySliceUnits),
        passes((layout.value_pitch + kPassChannels - 1) / kPassChannels) {}

  EDUBA_DEVICE void Prepare() {
    block.Threads([&](int t) {
      if (t < kWarpgroupTileMax) PrepareVector(t);
      if (t < space.slots) {
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
    block.Threads([&](int t) {
      if (t < kMultiplyGroups * kHulls) FindPartOfHull(t);
      for (int i = t; i < args.tile * units; i += kWarpgroupThreads) StoreQueryUnit(t, i / units, i % units);
      block.Publish(t);
    });
    block.Threads([&](int t) {
      if (t < kMultiplyGroups) FindHull(t);
    });
  }

  // Whether any vector of the block sees the page, so that it is loaded. Alike for all threads.
  EDUBA_DEVICE bool IsLoaded(int64_t page) const {
    return block.Uniform(SeesPage(shared.hull[0], page) || SeesPage(shared.hull[1], page) ? 1 : 0) != 0;
  }
  // Tiles of 8 channels that are left for a pass, or more.
  EDUBA_DEVICE int TilesOf(int pass) const { return layout.value_pitch / kTileColumns - pass * kPassTiles; }

  const Block& block;
  const AttendArgs& args;
  const PageLayout& layout;
  Registers& registers;
  const bool is_summed;
  const WarpgroupSpace space;
  // In the block's shared memory.
  GroupShared& shared;
  UnitPair* const unit_pairs;
  char* const words;
  char* const queries;
  char* const slots;
  const int kv_head;
  const int64_t first_slot;  // The first of the run's pages, among the step's.
  const int64_t last_slot;
  const int64_t row_heads;
  const int first_vector;  // The tile's, among the KV head's.
  const int vectors;       // The tile's vectors.
  const bool take_turns;   // Both groups have all vectors and take turns at the pages; else each has its own.
  const int units;
  const int key_slices;
  const int passes;

 private:
  EDUBA_DEVICE static int Smaller(int x, int y) { return x < y ? x : y; }

  EDUBA_DEVICE void PrepareVector(int t) {
    VectorState& v = shared.vector[t];
    v.begin = v.end = 0;
    v.listed = nullptr;
    v.row_head = -1;
    v.reference = 0;
    v.l = v.fault = 0;
    shared.stretch[t] = shared.shrink[t] = 1;
    const int i = take_turns ? t % kGroupTileRows : t;  // The vector's place in the tile.
    if (i >= vectors) return;
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

  EDUBA_DEVICE void FindPartOfHull(int t) {
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
  EDUBA_DEVICE void FindHull(int t) {
    PositionRange hull = {0, 0};
    PositionRange core = shared.part_core[t * kHulls];
    for (int i = 0; i < kHulls; ++i) {
      hull = HullOf(hull, shared.part_hull[t * kHulls + i]);
      core = CoreOf(core, shared.part_core[t * kHulls + i]);
    }
    shared.hull[t] = hull;
    shared.core[t] = core;
  }

  // 8 dimensions of vector v in their terms, as core matrices: [64 vectors][term][8 dimensions][64][8].
  EDUBA_DEVICE void StoreQueryUnit(int t, int v, int unit) {
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
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_WARPGROUP_WORK_H_
