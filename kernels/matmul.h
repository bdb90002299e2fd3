#ifndef EDUBA_KERNELS_MATMUL_H_
#define EDUBA_KERNELS_MATMUL_H_

#include <cstdint>

#include "base/dtype.h"

namespace eduba {

// A weight matrix as model files keep it: [outputs, inputs], rows one after another, elements of `dtype`.
struct MatrixView {
  const void* data = nullptr;  // Any alignment of at least one element.
  DType dtype = DType::kF32;
  int64_t outputs = 0;
  int64_t inputs = 0;
};

// Weights in the layout of the kernels that packed them (LayerKernels::Pack). Never changes; the kernels that
// made it must outlive it.
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  // The bytes of memory that one row of activations has to read.
  int64_t bytes() const { return bytes_; }

 protected:
  PackedMatrix(int64_t outputs, int64_t inputs, int64_t bytes)
      : outputs_(outputs), inputs_(inputs), bytes_(bytes) {}

 private:
  const int64_t outputs_;
  const int64_t inputs_;
  const int64_t bytes_;
};

// What a product with bf16 weights makes of the activations, and attention over bf16 keys of the queries;
// with other weights and keys they are always f32.
enum class Activations : uint8_t {
  kF32,   // Takes them as they are.
  kBf16,  // Rounds them to bf16 (to nearest, ties to even), for the dot products that some chips have.
};

// y = x W^T + bias. Weights count as their exact values, x is f32 and rounded only where Activations says so,
// sums are f32:
//   y[n] = (s_0 + s_1 + ...) + bias[n],  s_b = fused multiply-adds over inputs [256 b, 256 b + 256) in order,
//   from 0; with rounded activations the second of each pair of inputs comes before the first, and subnormal
//   numbers count as zeros, because VDPBF16PS computes so
// so a row's bits depend on nothing but the row: not on `rows`, threads, or the width of vectors
// (docs/adr/0006-matmul.md). Targets without fused multiply-add give other bits.
struct MatmulArgs {
  const PackedMatrix* weights = nullptr;
  int64_t rows = 0;
  const float* x = nullptr;     // [rows, inputs]
  const float* bias = nullptr;  // [outputs], or none
  float* y = nullptr;           // [rows, outputs], aliases no input
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_MATMUL_H_
