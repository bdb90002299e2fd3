#ifndef EDUBA_KERNELS_CPU_ROW_KERNELS_H_
#define EDUBA_KERNELS_CPU_ROW_KERNELS_H_

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/norm.h"
#include "kernels/rope.h"

namespace eduba {

// The one-thread kernels of one Highway target, for all rows of their arguments.
using NormaliseFunction = void (*)(const NormArgs& args);
using RotateFunction = void (*)(const RopeArgs& args);
struct ActivationFunctions {
  void (*activate)(const ActivationArgs& args);
  void (*softcap)(const SoftcapArgs& args);
};

// kernels/log_sum.h, for x [count].
using LogSumFunction = double (*)(const float* x, int64_t count);

// For one of Highway's targets that this machine runs.
NormaliseFunction NormaliseFor(int64_t target);
RotateFunction RotateFor(int64_t target);
ActivationFunctions ActivationFor(int64_t target);
LogSumFunction LogSumFor(int64_t target);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_ROW_KERNELS_H_
