#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_block.h"
#include "kernels/cuda/gpu_warpgroup.h"
#include "kernels/cuda/launch.h"

namespace eduba::cuda {
namespace {

// Blocks of 256 threads that a multiprocessor holds at least, so that some load while others compute: as many
// as the compiler finds registers for without spilling.
template <class Type, int kTile>
constexpr int kAttendBlocks = Type::kElement == 4 || kTile > 2 ? 2
                              : kTile == 2                     ? 3
                                                               : 4;

template <class Type, int kTile>
__global__ void __launch_bounds__(kAttendThreads, (kAttendBlocks<Type, kTile>))
    AttendKernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ float4 shared[];
  AttendPages<Type, kTile>(GpuBlock(shared), args);
}

// S of a page is 128 registers of a thread: as many as there are.
template <class Type>
__global__ void __launch_bounds__(kTensorThreadsMax) TensorKernel(const __grid_constant__ AttendArgs args) {
  __shared__ float4 shared[(sizeof(TensorShared) + sizeof(float4) - 1) / sizeof(float4)];
  AttendPageTensor<Type>(GpuBlock(shared), args);
}

// Only sm_90a has the instructions, and only builds with -DEDUBA_CUDA_WGMMA=ON have the code; HasWarpgroups
// tells whether this is the code that runs.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && defined(EDUBA_CUDA_WGMMA)
#define EDUBA_HAS_WARPGROUPS
#endif
template <class Type, int kPassChannels>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    WarpgroupKernel(const __grid_constant__ AttendArgs args) {
#ifdef EDUBA_HAS_WARPGROUPS
  extern __shared__ float4 shared[];
  AttendPagesWarpgroup<Type, kPassChannels>(GpuGroupBlock(shared), args);
#endif
}

__global__ void HasWarpgroupsKernel(int* has) {
#ifdef EDUBA_HAS_WARPGROUPS
  *has = 1;
#else
  *has = 0;
#endif
}

__global__ void __launch_bounds__(kSumThreads) SumKernel(const __grid_constant__ SumArgs args) {
  __shared__ float4 shared[(sizeof(SumShared) + sizeof(float4) - 1) / sizeof(float4)];
  SumPages(GpuBlock(shared), args);
}

__global__ void __launch_bounds__(kLoopThreads) LoopKernel(const __grid_constant__ LoopArgs args) {
  MultiplyLoop<Bf16>(GpuBlock(nullptr), args);
}

__global__ void __launch_bounds__(kSumThreads) MagnitudeKernel(const __grid_constant__ MagnitudeArgs args) {
  RaiseMagnitudes(GpuBlock(nullptr), args);
}

template <class Stored>
__global__ void __launch_bounds__(kRowThreads) WriteKernel(const __grid_constant__ WriteArgs args) {
  WriteRows<Stored>(GpuBlock(nullptr), args);
}

template <class Type>
__global__ void __launch_bounds__(kSinkThreads) SinkKernel(const __grid_constant__ SinkArgs args) {
  __shared__ float4 shared[(sizeof(SinkShared) + sizeof(float4) - 1) / sizeof(float4)];
  ScoreSinks<Type>(GpuBlock(shared), args);
}

template <class Type>
__global__ void __launch_bounds__(kFinaliseThreads)
    FinaliseKernel(const __grid_constant__ FinaliseArgs args) {
  __shared__ float4 shared[(sizeof(FinaliseShared) + sizeof(float4) - 1) / sizeof(float4)];
  FinaliseRowHead<Type>(GpuBlock(shared), args);
}

template <class Args>
__global__ void __launch_bounds__(kLayerThreads) LayerKernel(const __grid_constant__ Args args) {
  __shared__ float4 shared[sizeof(LayerShared) / sizeof(float4)];
  RunLayer(GpuBlock(shared), args);
}

// The bytes of shared memory that a kernel gets without asking.
constexpr int64_t kSharedBytesFree = 48 << 10;

template <class Type, int kTile>
cudaError_t AllowShared(int64_t bytes) {
  if (bytes <= kSharedBytesFree) return cudaSuccess;
  return cudaFuncSetAttribute(AttendKernel<Type, kTile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

struct AttendLaunch {
  cudaStream_t stream;
  const AttendArgs& args;
  template <class Type, int kTile>
  cudaError_t Attend() const {
    const int64_t bytes = AttendSharedBytes(args);
    const cudaError_t error = AllowShared<Type, kTile>(bytes);
    if (error != cudaSuccess) return error;
    AttendKernel<Type, kTile><<<static_cast<unsigned>(args.blocks()), kAttendThreads, bytes, stream>>>(args);
    return cudaGetLastError();
  }
};

template <class Type, int kPassChannels>
cudaError_t LaunchWarpgroupKernel(cudaStream_t stream, const AttendArgs& args) {
  const int bytes = WarpgroupSpaceOf(args).bytes;
  const cudaError_t error = cudaFuncSetAttribute(WarpgroupKernel<Type, kPassChannels>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  WarpgroupKernel<Type, kPassChannels>
      <<<static_cast<unsigned>(args.blocks()), kWarpgroupThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

struct AttendCount {
  const AttendArgs& args;
  int* blocks;
  template <class Type, int kTile>
  cudaError_t Attend() const {
    const int64_t bytes = AttendSharedBytes(args);
    const cudaError_t error = AllowShared<Type, kTile>(bytes);
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, AttendKernel<Type, kTile>, kAttendThreads,
                                                         bytes);
  }
};

}  // namespace

cudaError_t LaunchAttend(cudaStream_t stream, Element element, const AttendArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  return ForAttend(element, args.tile, AttendLaunch{stream, args});
}

cudaError_t CountAttendBlocks(Element element, const AttendArgs& args, int* blocks) {
  return ForAttend(element, args.tile, AttendCount{args, blocks});
}

cudaError_t LaunchAttendTensor(cudaStream_t stream, Element element, const AttendArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(args.blocks());
  if (element == Element::kBf16) TensorKernel<Bf16><<<blocks, TensorThreads(args.tile), 0, stream>>>(args);
  if (element == Element::kF16) TensorKernel<F16><<<blocks, TensorThreads(args.tile), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchAttendWarpgroups(cudaStream_t stream, Element element, const AttendArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  const bool is_narrow = GroupChannels(args.layout) == kGroupChannelsMax / 2;
  if (element == Element::kBf16) {
    return is_narrow ? LaunchWarpgroupKernel<Bf16, kGroupChannelsMax / 2>(stream, args)
                     : LaunchWarpgroupKernel<Bf16, kGroupChannelsMax>(stream, args);
  }
  return is_narrow ? LaunchWarpgroupKernel<F16, kGroupChannelsMax / 2>(stream, args)
                   : LaunchWarpgroupKernel<F16, kGroupChannelsMax>(stream, args);
}

cudaError_t HasWarpgroups(bool* has) {
  int* on_device = nullptr;
  int answer = 0;
  cudaError_t error = cudaMalloc(&on_device, sizeof(answer));
  if (error != cudaSuccess) return error;
  HasWarpgroupsKernel<<<1, 1>>>(on_device);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(&answer, on_device, sizeof(answer), cudaMemcpyDeviceToHost);
  cudaFree(on_device);
  *has = answer != 0;
  return error;
}

cudaError_t LaunchSum(cudaStream_t stream, const SumArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  SumKernel<<<static_cast<unsigned>(args.blocks()), kSumThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchMultiplyLoop(cudaStream_t stream, const LoopArgs& args) {
  LoopKernel<<<static_cast<unsigned>(args.blocks), kLoopThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchMagnitudes(cudaStream_t stream, const MagnitudeArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  MagnitudeKernel<<<static_cast<unsigned>(args.blocks()), kSumThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchWrite(cudaStream_t stream, const WriteArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(args.blocks());
  if (args.layout.element == 4) {
    WriteKernel<uint32_t><<<blocks, kRowThreads, 0, stream>>>(args);
  } else {
    WriteKernel<uint16_t><<<blocks, kRowThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchScoreSinks(cudaStream_t stream, Element element, const SinkArgs& args) {
  const auto blocks = static_cast<unsigned>(args.blocks());
  if (element == Element::kF32) SinkKernel<F32><<<blocks, kSinkThreads, 0, stream>>>(args);
  if (element == Element::kBf16) SinkKernel<Bf16><<<blocks, kSinkThreads, 0, stream>>>(args);
  if (element == Element::kF16) SinkKernel<F16><<<blocks, kSinkThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchFinalise(cudaStream_t stream, Element element, const FinaliseArgs& args) {
  if (args.blocks() == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(args.blocks());
  if (element == Element::kF32) FinaliseKernel<F32><<<blocks, kFinaliseThreads, 0, stream>>>(args);
  if (element == Element::kBf16) FinaliseKernel<Bf16><<<blocks, kFinaliseThreads, 0, stream>>>(args);
  if (element == Element::kF16) FinaliseKernel<F16><<<blocks, kFinaliseThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <class Args>
cudaError_t LaunchLayer(cudaStream_t stream, const Args& args) {
  if (LayerBlocks(args) == 0) return cudaSuccess;
  LayerKernel<<<static_cast<unsigned>(LayerBlocks(args)), kLayerThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
template cudaError_t LaunchLayer(cudaStream_t stream, const NormArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const RopeArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const ActivationArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const SoftcapArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const AddArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const NonFiniteArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const ScaleArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const SplitArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const JoinArgs& args);
template cudaError_t LaunchLayer(cudaStream_t stream, const CompareArgs& args);

cudaError_t LoadKernels() {
  cudaError_t error = cudaSuccess;
  const auto load = [&error](auto*... kernels) {
    cudaFuncAttributes attributes;
    ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
  };
  const auto load_for = [&load]<class Type>() {
    load(AttendKernel<Type, 1>, AttendKernel<Type, 2>, AttendKernel<Type, 4>, AttendKernel<Type, 8>,
         SinkKernel<Type>, FinaliseKernel<Type>);
  };
  const auto load_for_layers = [&load]<class... Args>(const std::variant<Args...>*) {
    load(LayerKernel<Args>...);
  };
  static_assert(kMaxTile == 8);
  load_for.template operator()<F32>();
  load_for.template operator()<Bf16>();
  load_for.template operator()<F16>();
  load(TensorKernel<Bf16>, TensorKernel<F16>, WarpgroupKernel<Bf16, kGroupChannelsMax / 2>,
       WarpgroupKernel<Bf16, kGroupChannelsMax>, WarpgroupKernel<F16, kGroupChannelsMax / 2>,
       WarpgroupKernel<F16, kGroupChannelsMax>);
  load(SumKernel, LoopKernel, MagnitudeKernel, WriteKernel<uint16_t>, WriteKernel<uint32_t>,
       HasWarpgroupsKernel);
  load_for_layers(static_cast<const LayerOperation*>(nullptr));
  return error;
}

}  // namespace eduba::cuda
