#ifndef EDUBA_KERNELS_CUDA_FAKE_CUBLASLT_H_
#define EDUBA_KERNELS_CUDA_FAKE_CUBLASLT_H_

#include <atomic>

#include "kernels/cuda/cublaslt_api.h"

namespace eduba::cuda {

// cuBLASLt as cuda_layer_kernels.cc sees it, over streams of the emulated device: products that are computed
// when their stream is waited for. It proposes three algorithms, of which the first wants a workspace and the
// second sums in parts; what it refuses is what cuBLASLt would refuse, or what nobody shall ask.
struct FakeCublasLt {
  // Faults, for all handles of the process. Set back by a new Reset().
  std::atomic<bool> depends_on_place{false};  // A row's bits are others in the second half of a block.
  std::atomic<bool> has_none{false};          // No algorithm for any shape.
  std::atomic<int> result{0};                 // What a product's call returns.
  std::atomic<int> products{0};               // Counted.

  void Reset();
};
FakeCublasLt& TheFakeCublasLt();

const CublasLtApi& FakeCublasLtApi();

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_FAKE_CUBLASLT_H_
