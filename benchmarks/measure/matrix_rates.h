#ifndef EDUBA_BENCHMARKS_MEASURE_MATRIX_RATES_H_
#define EDUBA_BENCHMARKS_MEASURE_MATRIX_RATES_H_

#include <functional>

namespace eduba {

// How fast large matrices are multiplied: the ceiling of a batch of queries. Each call multiplies once and
// says how many 10^9 operations a second that were. Calls come from one thread.
struct MatrixRates {
  std::function<double()> f32;
  std::function<double()> bf16;  // None where the chip has no such product.
};

// The rates of the program's own linear layers (kernels/matmul.h) on `threads` threads, at least 1: square
// matrices of 1024, and for bf16 activations that are rounded to bf16.
MatrixRates OwnMatrixRates(int threads);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_MATRIX_RATES_H_
