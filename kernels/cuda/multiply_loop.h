#ifndef EDUBA_KERNELS_CUDA_MULTIPLY_LOOP_H_
#define EDUBA_KERNELS_CUDA_MULTIPLY_LOOP_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"

// Products on tensor cores and nothing else, for benchmarks. See page_tensor.h for what a Block is.
namespace eduba::cuda {

inline constexpr int kLoopThreads = 256;
inline constexpr int kLoopTiles = 8;  // Independent products of a warp.

struct LoopArgs {
  int64_t blocks;
  int rounds;  // Rounds of kLoopTiles products for each warp.
  float* sum;  // [blocks * kLoopThreads]: so that no product is left out

  constexpr double operations() const {
    constexpr double kProduct = 2.0 * kTileRows * kTileColumns * kTileDepth;
    constexpr int kWarps = kLoopThreads / kWarpThreads;
    return kProduct * kLoopTiles * rounds * kWarps * static_cast<double>(blocks);
  }
};

struct LoopRegisters {
  float c[kLoopTiles][4];
  uint32_t a[4];
  uint32_t b[2];
};

template <class Type, class Block>
EDUBA_DEVICE void MultiplyLoop(const Block& block, const LoopArgs& args) {
  typename Block::template Registers<LoopRegisters> registers(block);
  block.Warps([&](const auto& warp) {
    const auto registers_of = [&](int lane) -> LoopRegisters& {
      return registers[warp.index() * kWarpThreads + lane];
    };
    warp.Lanes([&](int lane) {
      LoopRegisters& r = registers_of(lane);
      EDUBA_UNROLL
      for (int i = 0; i < kLoopTiles; ++i) r.c[i][0] = r.c[i][1] = r.c[i][2] = r.c[i][3] = 0;
      EDUBA_UNROLL
      for (int i = 0; i < 4; ++i) r.a[i] = Type::Pack(static_cast<float>(lane), 1);
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) r.b[i] = Type::Pack(1, static_cast<float>(i));
    });
    for (int round = 0; round < args.rounds; ++round) {
      EDUBA_UNROLL
      for (int i = 0; i < kLoopTiles; ++i) {
        warp.template Multiply<Type>([&](int lane) {
          LoopRegisters& r = registers_of(lane);
          return MatrixOperands{r.c[i], r.a, r.b};
        });
      }
    }
    warp.Lanes([&](int lane) {
      const LoopRegisters& r = registers_of(lane);
      float sum = 0;
      EDUBA_UNROLL
      for (int i = 0; i < kLoopTiles; ++i) sum = Add(sum, r.c[i][0]);
      args.sum[block.index() * kLoopThreads + warp.index() * kWarpThreads + lane] = sum;
    });
  });
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_MULTIPLY_LOOP_H_
