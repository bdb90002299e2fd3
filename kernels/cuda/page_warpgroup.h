#ifndef EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_
#define EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_

#include <type_traits>

#include "kernels/cuda/warpgroup_loader.h"
#include "kernels/cuda/warpgroup_multiplier.h"
#include "kernels/cuda/warpgroup_space.h"
#include "kernels/cuda/warpgroup_work.h"

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
// Beyond what page_tensor.h asks of a Block, and all of it so that a host can emulate it
// (emulated_warpgroup.h):
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
//     KeepProducts(c_of)            after a wait for all: nothing that uses c may move before it
//   InitBarrier(barrier, count)   of `count` arrivals a phase, and of the bytes that were expected
//   Expect(barrier, bytes), Arrive(barrier)
//   CopyBulk(shared, global, bytes, barrier)      multiples of 16; tells the barrier when it is there
//   Store(t, shared, value)       16 bytes that products will read; Publish(t): the thread's stores and
//   copies
//                                 that are done may be read by products, after a barrier
//   AddressOf(shared)             as a descriptor has it
namespace eduba::cuda {

template <class Type, int kPassChannels, class Block>
EDUBA_DEVICE void AttendPagesWarpgroup(const Block& block, const AttendArgs& args) {
  static_assert(Type::kElement == 2);
  using Work = WarpgroupWork<Type, kPassChannels, Block>;
  typename Work::Registers registers(block);
  Work work(block, args, registers);
  work.Prepare();
  block.Groups([&](const auto& group) {
    using Group = std::decay_t<decltype(group)>;
    if (group.index() == 0) {
      group.template GiveRegisters<kLoadRegisters>();
      WarpgroupLoader<Work, Group>(work, group).Run();
    } else {
      group.template TakeRegisters<kMultiplyRegisters>();
      WarpgroupMultiplier<Work, Group>(work, group).Run();
    }
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_PAGE_WARPGROUP_H_
