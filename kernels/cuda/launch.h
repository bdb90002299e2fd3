#ifndef EDUBA_KERNELS_CUDA_LAUNCH_H_
#define EDUBA_KERNELS_CUDA_LAUNCH_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"

// From run-time numbers to the template that serves them, once for the GPU and its emulation.
namespace eduba::cuda {

// Calls launch.template Attend<Type, kTile>().
template <class Type, class Launch>
auto ForTile(int tile, const Launch& launch) {
  switch (tile) {
    case 1:
      return launch.template Attend<Type, 1>();
    case 2:
      return launch.template Attend<Type, 2>();
    case 4:
      return launch.template Attend<Type, 4>();
    default:
      static_assert(kMaxTile == 8);
      return launch.template Attend<Type, 8>();
  }
}

template <class Launch>
auto ForAttend(Element element, int tile, const Launch& launch) {
  switch (element) {
    case Element::kF32:
      return ForTile<F32>(tile, launch);
    case Element::kBf16:
      return ForTile<Bf16>(tile, launch);
    default:
      return ForTile<F16>(tile, launch);
  }
}

inline int64_t AttendSharedBytes(const AttendArgs& args) {
  return int64_t{
             MakeAttendShared(args.tile, args.layout.head_pitch, args.layout.value_pitch, args.is_summed())
                 .floats} *
         static_cast<int64_t>(sizeof(float));
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_LAUNCH_H_
