#ifndef EDUBA_KERNELS_CUDA_EMULATED_DEVICE_H_
#define EDUBA_KERNELS_CUDA_EMULATED_DEVICE_H_

#include <cstdint>
#include <memory>

#include "kernels/cuda/device.h"

namespace eduba::cuda {

// A device that runs the GPU's kernels on the host, block after block and phase after phase, for tests: the
// same source, the same numbers. Streams are EmulatedQueue's, so queued work is done when it is waited for.
// `memory_bytes` is what it has. What it cannot show: races between threads of a phase (compute-sanitizer
// does, tests/gpu/run.sh), and CUDA itself. `has_warpgroups`: it is an sm_90a.
std::unique_ptr<Device> MakeEmulatedDevice(int64_t memory_bytes, bool has_warpgroups = false);
// Its Device::index, which no GPU has.
inline constexpr int kEmulatedDeviceIndex = 1 << 20;

// From the `calls`-th call that queues work on, every call fails as a broken GPU's does.
void BreakEmulatedDevice(Device& device, int calls);

// The call that queues work after `calls` others finds no memory for that, as a launch may; later ones do.
void ExhaustEmulatedDevice(Device& device, int calls);

// Whether this machine can run it: it is built with fused multiply-add.
bool EmulatedDeviceRuns();

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_EMULATED_DEVICE_H_
