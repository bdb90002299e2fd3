#ifndef EDUBA_KERNELS_CUDA_CUDA_KERNELS_H_
#define EDUBA_KERNELS_CUDA_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/finalise.h"
#include "kernels/cuda/layer_rows.h"
#include "kernels/cuda/multiply_loop.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_rows.h"
#include "kernels/cuda/page_sums.h"
#include "kernels/cuda/page_tensor.h"
#include "kernels/cuda/page_warpgroup.h"
#include "kernels/cuda/sink_scores.h"

// Launches of the kernels: what nvcc compiles, and nothing else. The rest of the program calls them from
// plain C++. Each queues one launch, or none where there is no block to run.
namespace eduba::cuda {

cudaError_t LaunchAttend(cudaStream_t stream, Element element, const AttendArgs& args);
// Blocks of that launch that one multiprocessor holds at a time.
cudaError_t CountAttendBlocks(Element element, const AttendArgs& args, int* blocks);
// REQUIRES: elements of 16 bits.
cudaError_t LaunchAttendTensor(cudaStream_t stream, Element element, const AttendArgs& args);
// REQUIRES: HasWarpgroups; TakesWarpgroups(args.layout).
cudaError_t LaunchAttendWarpgroups(cudaStream_t stream, Element element, const AttendArgs& args);
// Whether the current device runs code for sm_90a.
cudaError_t HasWarpgroups(bool* has);
cudaError_t LaunchSum(cudaStream_t stream, const SumArgs& args);
cudaError_t LaunchMultiplyLoop(cudaStream_t stream, const LoopArgs& args);
cudaError_t LaunchMagnitudes(cudaStream_t stream, const MagnitudeArgs& args);
cudaError_t LaunchWrite(cudaStream_t stream, const WriteArgs& args);
cudaError_t LaunchScoreSinks(cudaStream_t stream, Element element, const SinkArgs& args);
cudaError_t LaunchFinalise(cudaStream_t stream, Element element, const FinaliseArgs& args);
// For the arguments of layer_rows.h.
template <class Args>
cudaError_t LaunchLayer(cudaStream_t stream, const Args& args);

// Brings all kernels of this file to the current device, which CUDA would do when each is first started
// (CUDA_MODULE_LOADING=LAZY, its default): cudaErrorMemoryAllocation where there is no room for them,
// cudaErrorNoKernelImageForDevice where the program has no code for the device.
cudaError_t LoadKernels();

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_CUDA_KERNELS_H_
