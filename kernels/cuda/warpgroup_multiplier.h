#ifndef EDUBA_KERNELS_CUDA_WARPGROUP_MULTIPLIER_H_
#define EDUBA_KERNELS_CUDA_WARPGROUP_MULTIPLIER_H_

#include <cstdint>

#include "kernels/cuda/warpgroup_work.h"

namespace eduba::cuda {

// A warpgroup that multiplies: 64 query vectors against the pages that they see, slice by slice out of the
// ring.
template <class Work, class Group>
class WarpgroupMultiplier {
 public:
  EDUBA_DEVICE WarpgroupMultiplier(Work& work, const Group& group)
      : work_(work),
        group_(group),
        mine_(group.index() - 1),
        first_thread_(group.index() * kGroupThreads),
        query_(work.queries + (work.take_turns ? 0 : mine_) * work.space.query_bytes) {}

  EDUBA_DEVICE void Run() {
    group_.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          RegistersAt(warp, lane).shrink[i] =
              work_.shared.shrink[mine_ * kGroupTileRows + warp.index() * kTileRows + 8 * i + lane / 4];
        }
      });
    });
    int turn = 0;
    for (int64_t slot = work_.first_slot; slot < work_.last_slot; ++slot) {
      const PageEntry page = work_.args.page[slot];
      const bool comes = work_.IsLoaded(page.index);
      const bool is_seen = work_.block.Uniform(SeesPage(work_.shared.hull[mine_], page.index) ? 1 : 0) != 0;
      const bool is_mine = !work_.take_turns || turn % kMultiplyGroups == mine_;
      if (comes) ++turn;
      if (is_seen && is_mine) {
        AttendPage(slot, page);
        continue;
      }
      if (is_mine && !work_.is_summed) KeepNothing(slot);
      if (comes) SkipPage();
    }
    if (work_.is_summed) AddToTotals();
  }

 private:
  using Type = typename Work::Type;
  using Registers = typename Work::ThreadRegisters;
  static constexpr int kPassTiles = Work::kPassTiles;

  template <class Warp>
  EDUBA_DEVICE Registers& RegistersAt(const Warp& warp, int lane) {
    return work_.registers[first_thread_ + warp.index() * kWarpThreads + lane];
  }
  template <class Warp>
  EDUBA_DEVICE VectorState& VectorOf(const Warp& warp, int lane, int i) {
    return work_.shared.vector[mine_ * kGroupTileRows + warp.index() * kTileRows + 8 * i + lane / 4];
  }
  // The group's words of a lane's vector i, 8 channels a tile.
  template <class Warp>
  EDUBA_DEVICE WordPair& WordsOf(const Warp& warp, int lane, int i, int channel_tile) {
    const int block_of_vectors = mine_ * work_.space.blocks + 2 * warp.index() + i;
    const int tiles = work_.layout.value_pitch / kTileColumns;
    return reinterpret_cast<WordPair*>(
        work_.words)[(block_of_vectors * tiles + channel_tile) * kWarpThreads + lane];
  }

  EDUBA_DEVICE void WaitForSlice() { group_.Wait(&work_.shared.full[place_.slot], place_.parity); }
  EDUBA_DEVICE void GiveBack(int slot) {
    group_.Threads([&](int t) {
      if (t % kWarpThreads == 0) work_.block.Arrive(&work_.shared.empty[slot]);
    });
  }
  EDUBA_DEVICE int SlotBefore() const { return (place_.slot == 0 ? work_.space.slots : place_.slot) - 1; }
  // After the last slice of several.
  EDUBA_DEVICE void FinishSlices() {
    group_.template WaitForProducts<0>();
    GiveBack(SlotBefore());
  }
  // Every group takes part in every phase of a barrier: a parity tells a phase from the next one only.
  EDUBA_DEVICE void SkipPage() {
    for (int s = 0; s < work_.key_slices + work_.passes * kGroupValueSlices; ++s) {
      WaitForSlice();
      GiveBack(place_.slot);
      place_.Next(work_.space.slots);
    }
  }
  EDUBA_DEVICE void KeepNothing(int64_t slot) {
    group_.Threads([&](int t) {
      if (t >= kGroupTileRows) return;
      const int64_t row_head = work_.shared.vector[mine_ * kGroupTileRows + t].row_head;
      if (row_head < 0) return;
      work_.args.m[slot * work_.row_heads + row_head] = -Infinity();
      work_.args.l[slot * work_.row_heads + row_head] = 0;
    });
  }

  EDUBA_DEVICE void AttendPage(int64_t slot, const PageEntry& page) {
    const PositionRange core = work_.shared.core[mine_];
    const bool is_whole = core.begin <= page.index * kPageRows && core.end >= (page.index + 1) * kPageRows;
    const bool all_seen = work_.args.whole_lists && work_.block.Uniform(is_whole ? 1 : 0) != 0;
    if (work_.args.query_terms == 2) {
      MultiplyAllKeys<2>();
    } else {
      MultiplyAllKeys<1>();
    }
    FinishSlices();
    group_.KeepProducts(
        [&](int t) -> float(&)[kKeyTiles][4] { return work_.registers[first_thread_ + t].s; });
    group_.Warps([&](const auto& warp) { Weigh(warp, slot, page, all_seen); });
    for (int pass = 0; pass < work_.passes; ++pass) {
      EDUBA_UNROLL
      for (int part = 0; part < kGroupValueSlices; ++part) MultiplyValues(part);
      FinishSlices();
      group_.KeepProducts(
          [&](int t) -> float(&)[kPassTiles][4] { return work_.registers[first_thread_ + t].o; });
      group_.Warps([&](const auto& warp) { KeepOutputs(warp, slot, pass); });
    }
    group_.Warps([&](const auto& warp) { KeepSums(warp, slot, page); });
  }

  // For each number of terms by itself: products have to stand in one line for the compiler.
  template <int kTerms>
  EDUBA_DEVICE void MultiplyAllKeys() {
    MultiplyKeys<kTerms, false>(0);
    for (int s = 1; s < work_.key_slices; ++s) MultiplyKeys<kTerms, true>(s);
  }
  // 16 dimensions.
  template <int kTerms, bool kIsSum>
  EDUBA_DEVICE void MultiplyKeys(int s) {
    WaitForSlice();
    const uint32_t keys = work_.block.AddressOf(work_.slots + place_.slot * kSlotBytes);
    group_.FenceRegisters();
    EDUBA_UNROLL
    for (int term = 0; term < kTerms; ++term) {
      const char* const query = query_ + (term * work_.units + s * kKeySliceUnits) * kQueryUnitBytes;
      group_.template MultiplyKeys<Type>(
          [&](int t) -> float(&)[kKeyTiles][4] { return work_.registers[first_thread_ + t].s; },
          MatrixDescriptor(work_.block.AddressOf(query), kQueryUnitBytes, kCoreBytes),
          MatrixDescriptor(keys, kKeyUnitBytes, kCoreBytes), kIsSum || term > 0);
    }
    group_.CommitProducts();
    if constexpr (kIsSum) {
      group_.template WaitForProducts<1>();
      GiveBack(SlotBefore());
    }
    place_.Next(work_.space.slots);
  }

  // From dot products to weights in their terms; where sums are kept, takes the page's m and l into them.
  template <class Warp>
  EDUBA_DEVICE void Weigh(const Warp& warp, int64_t slot, const PageEntry& page, bool all_seen) {
    const auto registers_of = [&](int lane) -> Registers& { return RegistersAt(warp, lane); };
    warp.Lanes([&](int lane) {
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) registers_of(lane).seen[i] = KeysSeen(VectorOf(warp, lane, i), slot, page);
    });
    WeighKeys<Type>(
        warp, work_.args, registers_of, [&](int lane, int i) { return registers_of(lane).seen[i]; },
        page.live, all_seen);
    warp.Lanes([&](int lane) { SplitWeights(registers_of(lane)); });
    if (!work_.is_summed) return;
    warp.Sync();
    // Lanes 0 and 1 of four look after the vectors that the four share.
    warp.Lanes([&](int lane) {
      const int i = lane % 4;
      if (i >= 2) return;
      const Registers& r = registers_of(lane);
      const bool is_first = i == 0;
      const KeyRange seen = is_first ? r.seen[0] : r.seen[1];
      const float l = is_first ? r.l[0] : r.l[1];
      TakePage(work_.args, page.index, seen.begin < seen.end,
               (is_first ? r.bad[0] : r.bad[1]) == 0 && IsFinite(l), is_first ? r.m[0] : r.m[1], l,
               VectorOf(warp, lane, i));
    });
    warp.Sync();
  }
  // Two tiles of 8 keys as c are one of 16 keys as a.
  EDUBA_DEVICE static void SplitWeights(Registers& r) {
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
  }

  EDUBA_DEVICE void MultiplyValues(int part) {
    WaitForSlice();
    group_.FenceRegisters();
    const uint32_t values = work_.block.AddressOf(work_.slots + place_.slot * kSlotBytes);
    EDUBA_UNROLL
    for (int i = 0; i < kGroupValueRows / kTileDepth; ++i) {
      const int step = part * (kGroupValueRows / kTileDepth) + i;
      const uint64_t b = MatrixDescriptor(values + i * kTileDepth * kLoadBytes, kCoreBytes, kValueUnitBytes);
      if constexpr (kWeightTerms<Type> == 2) {
        group_.template MultiplyValues<Type>(
            [&](int t) {
              Registers& r = work_.registers[first_thread_ + t];
              return GroupOperands<kPassTiles>{r.o, r.low[step]};
            },
            b, step > 0);
      }
      group_.template MultiplyValues<Type>(
          [&](int t) {
            Registers& r = work_.registers[first_thread_ + t];
            return GroupOperands<kPassTiles>{r.o, r.high[step]};
          },
          b, step > 0 || kWeightTerms<Type> == 2);
    }
    group_.CommitProducts();
    if (part > 0) {
      group_.template WaitForProducts<1>();
      GiveBack(SlotBefore());
    }
    place_.Next(work_.space.slots);
  }

  // Adds a pass over a page to the group's words, or stores it as a part of the page's partial.
  template <class Warp>
  EDUBA_DEVICE void KeepOutputs(const Warp& warp, int64_t slot, int pass) {
    warp.Lanes([&](int lane) {
      Registers& r = RegistersAt(warp, lane);
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (r.seen[i].begin >= r.seen[i].end) continue;
        const VectorState& v = VectorOf(warp, lane, i);
        if (work_.is_summed && v.bound >= 0) {
          AddWords(warp, lane, i, pass, v.weight, v.bound);
          continue;
        }
        float* const to = work_.args.o + (slot * work_.row_heads + v.row_head) * work_.layout.value_pitch +
                          pass * Work::kPassChannels + lane % 4 * 2;
        EDUBA_UNROLL
        for (int n = 0; n < kPassTiles; ++n) {
          if (n >= work_.TilesOf(pass)) continue;
          const float x = Unshifted<Type>(r.o[n][2 * i]);
          const float y = Unshifted<Type>(r.o[n][2 * i + 1]);
          if (!IsFinite(x) || !IsFinite(y)) r.bad[i] = 1;
          if (!work_.is_summed) StorePair(to + n * kTileColumns, x, y);
        }
      }
    });
  }
  // What a pass over a page adds to the words of a lane's vector i. A few tiles are read before the first of
  // them is written, so that their arithmetic can overlap: a group has but one warp for each scheduler.
  template <class Warp>
  EDUBA_DEVICE void AddWords(const Warp& warp, int lane, int i, int pass, double weight, double bound) {
    if (work_.TilesOf(pass) >= kPassTiles) {
      constexpr int kTiles = 4;
      EDUBA_UNROLL
      for (int first = 0; first < kPassTiles; first += kTiles) {
        AddTiles<kTiles>(warp, lane, i, pass, first, weight, bound);
      }
    } else {
      EDUBA_UNROLL
      for (int first = 0; first < kPassTiles; ++first) {
        if (first < work_.TilesOf(pass)) AddTiles<1>(warp, lane, i, pass, first, weight, bound);
      }
    }
  }
  template <int kTiles, class Warp>
  EDUBA_DEVICE void AddTiles(const Warp& warp, int lane, int i, int pass, int first, double weight,
                             double bound) {
    Registers& r = RegistersAt(warp, lane);
    UnitPair unit[kTiles];
    WordPair sum[kTiles];
    EDUBA_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int tile_of_head = pass * kPassTiles + first + n;
      unit[n] = work_.unit_pairs[tile_of_head * (kTileColumns / 2) + lane % 4];
      sum[n] = WordsOf(warp, lane, i, tile_of_head);
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
    for (int n = 0; n < kTiles; ++n) WordsOf(warp, lane, i, pass * kPassTiles + first + n) = sum[n];
  }

  // The page's totals, or what became of it where sums are kept.
  template <class Warp>
  EDUBA_DEVICE void KeepSums(const Warp& warp, int64_t slot, const PageEntry& page) {
    EDUBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      warp.QuadMax([&](int lane) -> float& { return RegistersAt(warp, lane).bad[i]; });
      warp.Lanes([&](int lane) {
        const Registers& r = RegistersAt(warp, lane);
        VectorState& v = VectorOf(warp, lane, i);
        const bool sees_keys = r.seen[i].begin < r.seen[i].end;
        const bool is_good = r.bad[i] == 0 && IsFinite(r.l[i]);
        if (lane % 4 != i || v.row_head < 0) return;
        if (work_.is_summed) {
          if (sees_keys && !is_good) FailPage(work_.args, page.index, v);
        } else {
          KeepTotals(work_.args, slot, page.index, v.row_head, sees_keys, is_good, r.m[i], r.l[i]);
        }
      });
    }
  }
  // Adds the group's words to the step's, when all pages are done.
  EDUBA_DEVICE void AddToTotals() {
    const int value_dim = work_.layout.value_dim;
    group_.Warps([&](const auto& warp) {
      warp.Lanes([&](int lane) {
        EDUBA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const VectorState& v = VectorOf(warp, lane, i);
          if (v.row_head < 0) continue;
          uint64_t* const to = work_.args.words + v.row_head * (value_dim + 2);
          for (int n = 0; n < work_.layout.value_pitch / kTileColumns; ++n) {
            const WordPair pair = WordsOf(warp, lane, i, n);
            const int channel = n * kTileColumns + lane % 4 * 2;
            if (channel < value_dim && pair.word[0] != 0) AtomicAdd(&to[channel], pair.word[0]);
            if (channel + 1 < value_dim && pair.word[1] != 0) AtomicAdd(&to[channel + 1], pair.word[1]);
          }
          if (lane % 4 == i) AddToTotal(to + value_dim, v.l, v.fault != 0, work_.args.limit);
        }
      });
    });
  }

  Work& work_;
  const Group& group_;
  const int mine_;  // This group's number among the multiplying groups.
  const int first_thread_;
  const char* const query_;
  RingPlace place_;
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_WARPGROUP_MULTIPLIER_H_
