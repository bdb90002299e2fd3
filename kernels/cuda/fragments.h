#ifndef EDUBA_KERNELS_CUDA_FRAGMENTS_H_
#define EDUBA_KERNELS_CUDA_FRAGMENTS_H_

#include <cstdint>

// What the 32 lanes of a warp hold of the matrices of one mma.sync.m16n8k16, which adds a [16, 16] times b
// [16, 8] to c [16, 8]: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". With g = lane
// / 4 and p = lane % 4, and two 16-bit elements in a word, the lower column (of a) or row (of b) in its lower
// half:
//
//   a[0]  row g      columns 2 p, 2 p + 1        a[2]  row g      columns 2 p + 8, 2 p + 9
//   a[1]  row g + 8  columns 2 p, 2 p + 1        a[3]  row g + 8  columns 2 p + 8, 2 p + 9
//   b[0]  rows 2 p, 2 p + 1      column g        b[1]  rows 2 p + 8, 2 p + 9      column g
//   c[0], c[1]  row g      columns 2 p, 2 p + 1
//   c[2], c[3]  row g + 8  columns 2 p, 2 p + 1
//
// So the c of two neighbouring tiles of 8 columns, rounded and packed, are the a of the next product.
//
// And of one wgmma.mma_async.m64nNk16, by the 128 threads of a warpgroup ("Register Fragments", same place):
// each of its four warps has 16 rows, its a as above, and its c as that of N / 8 tiles side by side. What is
// not in registers is in shared memory, made of core matrices of 8 times 16 bytes that are 128 consecutive
// bytes; a descriptor says where the first one is and how far apart they are ("Matrix Descriptor Format",
// "Canonical Layouts", no swizzling):
//
//   along depth  ("K-major": a, and b as it is)   16 bytes are 8 of the depth, 8 rows of a or columns of b
//   across depth ("MN-major": b transposed)       16 bytes are 8 columns of b, 8 of the depth
//   leading: bytes to the next 8 of the depth     stride: bytes to the next 8 rows or columns
namespace eduba::cuda {

inline constexpr int kWarpThreads = 32;
inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 8;
inline constexpr int kTileDepth = 16;

// A lane's parts of one product.
struct MatrixOperands {
  float (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupThreads = kGroupWarps * kWarpThreads;
inline constexpr int kGroupTileRows = kGroupWarps * kTileRows;
inline constexpr int kCoreRows = 8;
inline constexpr int kCoreBytes = kCoreRows * 16;

// A matrix in shared memory. REQUIRES: multiples of 16 below 2^18.
constexpr uint64_t MatrixDescriptor(uint32_t address, int leading_bytes, int stride_bytes) {
  const auto encode = [](uint32_t x) { return uint64_t{(x & 0x3ffff) >> 4}; };
  return encode(address) | encode(static_cast<uint32_t>(leading_bytes)) << 16 |
         encode(static_cast<uint32_t>(stride_bytes)) << 32;
}

// A thread's parts of one product of a warpgroup whose a is in registers.
template <int kTiles>
struct GroupOperands {
  float (&c)[kTiles][4];
  const uint32_t (&a)[4];
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_FRAGMENTS_H_
