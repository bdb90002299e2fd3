#ifndef EDUBA_KERNELS_CPU_CPU_LAYER_KERNELS_H_
#define EDUBA_KERNELS_CPU_CPU_LAYER_KERNELS_H_

#include <memory>
#include <string>

#include "kernels/layer_kernels.h"

namespace eduba {

// SIMD kernels for this machine, on `threads` threads (at least 1) that live as long as the object.
std::unique_ptr<LayerKernels> MakeCpuLayerKernels(int threads, Activations activations = Activations::kF32);

// For tests: with one of CpuTargets() (cpu_backend.h) instead of the best, and without the dot products that
// this machine may have.
std::unique_ptr<LayerKernels> MakeCpuLayerKernelsForTest(int threads, const std::string& target,
                                                         Activations activations = Activations::kF32);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_CPU_LAYER_KERNELS_H_
