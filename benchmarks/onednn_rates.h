#ifndef EDUBA_BENCHMARKS_ONEDNN_RATES_H_
#define EDUBA_BENCHMARKS_ONEDNN_RATES_H_

#include "benchmarks/measure/matrix_rates.h"

namespace eduba {

// The rates of oneDNN's products of square matrices of 1024, on as many threads as it takes by itself. No
// bf16 where it has none for this chip.
MatrixRates OneDnnMatrixRates();

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_ONEDNN_RATES_H_
