#ifndef EDUBA_KERNELS_MERGE_KERNELS_H_
#define EDUBA_KERNELS_MERGE_KERNELS_H_

#include <cstdint>

namespace eduba {

// One row and head's answer: out[c] = (weight (words[c] / units[c]) + sum_t sink_weights[t]
// sink_values[t][c]) / total, in double, the terms in this order.
struct FinaliseCall {
  int count = 0;                   // Channels.
  const int64_t* words = nullptr;  // [count], or none
  const double* units = nullptr;   // [count]: powers of two within 2^-1000 and 2^1000
  double weight = 0;
  int sinks = 0;
  const double* sink_weights = nullptr;  // [sinks]
  const float* sink_values = nullptr;    // Sink t's begin at sink_values + t * sink_stride.
  int64_t sink_stride = 0;
  double total = 1;
  float* out = nullptr;  // [count]
};

// What MergingStep does for each channel of each row and head (docs/numerics.md sections 3 and 4): in double,
// without fused operations, so that all Highway targets give the same bits.
struct MergeKernels {
  void (*finalise)(const FinaliseCall& call);
  // The sum of (words[c] / units[c])^2, over 8 lanes and then pairwise; units as in FinaliseCall.
  double (*sum_squares)(const int64_t* words, const double* units, int count);
  // units[c] = 2^(fraction_bits - e): e is the smallest integer with exp(magnitudes[c] - m) <= 2^e, whatever
  // fp32 made of the two, kept within [least, most[c]]; `most` where m is not finite or a magnitude is NaN
  // or +inf, as after a fault.
  void (*maximum_units)(float m, const float* magnitudes, int count, int fraction_bits, double least,
                        const double* most, double* units);
};

MergeKernels MergeKernelsFor(int64_t target);
// The kernels of the machine's best target.
const MergeKernels& BestMergeKernels();

}  // namespace eduba

#endif  // EDUBA_KERNELS_MERGE_KERNELS_H_
