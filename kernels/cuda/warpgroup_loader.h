#ifndef EDUBA_KERNELS_CUDA_WARPGROUP_LOADER_H_
#define EDUBA_KERNELS_CUDA_WARPGROUP_LOADER_H_

#include <cstdint>

#include "kernels/cuda/warpgroup_work.h"

namespace eduba::cuda {

// The warpgroup that loads: the pages that the block sees, slice by slice, into the ring of slots.
template <class Work, class Group>
class WarpgroupLoader {
 public:
  EDUBA_DEVICE WarpgroupLoader(Work& work, const Group& group) : work_(work), group_(group) {}

  EDUBA_DEVICE void Run() {
    for (int64_t slot = work_.first_slot; slot < work_.last_slot; ++slot) {
      const PageEntry page = work_.args.page[slot];
      if (!work_.IsLoaded(page.index)) continue;
      const bool all_seen = AllSeen(slot, page);
      if (!all_seen) FindSeenRows(slot, page);
      for (int s = 0; s < work_.key_slices; ++s) LoadKeys(page, s);
      for (int s = 0; s < work_.passes * kGroupValueSlices; ++s) LoadValues(page, s, all_seen);
    }
  }

 private:
  using Type = typename Work::Type;

  // Loads a slice: start(t, lane, slot, barrier) for each lane of one warp; the next slice is the next
  // warp's. So what is there is handed over whether or not there is room for more.
  template <class Start>
  EDUBA_DEVICE void LoadSlice(const Start& start) {
    group_.Warps([&](const auto& warp) {
      if (warp.index() != turn_) return;
      group_.Wait(&work_.shared.empty[place_.slot], place_.parity ^ 1);
      warp.Lanes([&](int lane) {
        const int t = warp.index() * kWarpThreads + lane;
        start(t, lane, work_.slots + place_.slot * kSlotBytes, &work_.shared.full[place_.slot]);
        work_.block.CommitCopies(t);
        work_.block.template WaitForCopies<0>(t);
        work_.block.Publish(t);
        work_.block.Arrive(&work_.shared.full[place_.slot]);
      });
    });
    place_.Next(work_.space.slots);
    turn_ = (turn_ + 1) % kGroupWarps;
  }

  // Mostly the first vector or the last sees the whole page, and all rows are seen.
  EDUBA_DEVICE bool AllSeen(int64_t slot, const PageEntry& page) const {
    return work_.block.Uniform(SeesAll(slot, page, 0) || SeesAll(slot, page, work_.vectors - 1) ? 1 : 0) != 0;
  }
  EDUBA_DEVICE bool SeesAll(int64_t slot, const PageEntry& page, int v) const {
    const KeyRange seen = ListedKeys(work_.shared.vector[v], slot, page.index);
    return page.live == nullptr && seen.begin == 0 && seen.end == kPageRows;
  }
  EDUBA_DEVICE void FindSeenRows(int64_t slot, const PageEntry& page) {
    group_.Sync();  // Until all have done with the page before.
    group_.Threads([&](int t) {
      for (int row = t; row < kPageRows; row += kGroupThreads) {
        bool is_seen = false;
        for (int v = 0; v < work_.vectors && !is_seen; ++v) {
          const KeyRange keys = ListedKeys(work_.shared.vector[v], slot, page.index);
          is_seen = row >= keys.begin && row < keys.end;
        }
        work_.shared.seen[row] = is_seen && IsLive(page, row);
      }
    });
    group_.Sync();
  }

  // Keys that nobody sees may be anything: so are their logits, which nobody uses.
  EDUBA_DEVICE void LoadKeys(const PageEntry& page, int s) {
    LoadSlice([&](int /*t*/, int lane, char* to, uint64_t* barrier) {
      if (lane == 0) work_.block.Expect(barrier, kKeySliceUnits * kKeyUnitBytes);
      constexpr int kPieces = kPageRows / kKeyBlockRows;
      static_assert(kKeySliceUnits * kPieces <= kWarpThreads);
      if (lane >= kKeySliceUnits * kPieces) return;
      const int unit = lane / kPieces;
      const int piece = lane % kPieces;
      const int dim = (s * kKeySliceUnits + unit) * kUnitDims;
      work_.block.CopyBulk(to + unit * kKeyUnitBytes + piece * kKeyPieceBytes,
                           static_cast<const char*>(page.data) +
                               work_.layout.key(work_.kv_head, piece * kKeyBlockRows, dim) * Type::kElement,
                           kKeyPieceBytes, barrier);
    });
  }
  // A row of values that nobody sees counts as zeros, which its weight is as well. Channels after the last
  // may be anything: so are their sums, which nobody stores.
  EDUBA_DEVICE void LoadValues(const PageEntry& page, int s, bool all_seen) {
    const int first_channel = s / kGroupValueSlices * Work::kPassChannels;
    const int first_row = s % kGroupValueSlices * kGroupValueRows;
    LoadSlice([&](int t, int lane, char* to, uint64_t* /*barrier*/) {
      constexpr int kUnits = Work::kPassChannels / kCoreRows;
      constexpr int kRows = kWarpThreads / kUnits;  // At a time.
      const int unit = lane % kUnits;
      const int channel = first_channel + unit * kCoreRows;
      if (channel >= work_.layout.value_pitch) return;
      int row = lane / kUnits;
      const char* from = static_cast<const char*>(page.data) +
                         work_.layout.value(work_.kv_head, first_row + row, channel) * Type::kElement;
      for (; row < kGroupValueRows; row += kRows) {
        work_.block.CopyAsync(t, to + unit * kValueUnitBytes + row * kLoadBytes, from,
                              all_seen || work_.shared.seen[first_row + row]);
        from += int64_t{kRows} * work_.layout.value_pitch * Type::kElement;
      }
    });
  }

  Work& work_;
  const Group& group_;
  RingPlace place_;
  int turn_ = 0;  // The warp that loads the next slice.
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_WARPGROUP_LOADER_H_
