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

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_FRAGMENTS_H_
