#ifndef EDUBA_KERNELS_CUDA_CUDA_LAYER_KERNELS_H_
#define EDUBA_KERNELS_CUDA_CUDA_LAYER_KERNELS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/cuda/cublaslt_api.h"
#include "kernels/cuda/device.h"
#include "kernels/layer_kernels.h"

namespace eduba {

// A transformer's layers on a GPU: the kernels of layer_rows.h, and products by cuBLASLt in blocks of rows
// that always have one shape (docs/adr/0005-gpu.md, "Products"). On a stream of its own. Other bits than a
// CPU's, and others on another model of GPU or with another cuBLASLt: library() names both.
//
// FAILED_PRECONDITION where cuBLASLt is missing, RESOURCE_EXHAUSTED without memory. Pack: INTERNAL where
// cuBLASLt has no algorithm that treats all rows alike.
absl::StatusOr<std::unique_ptr<LayerKernels>> MakeCudaLayerKernels(std::shared_ptr<cuda::Device> device,
                                                                   Activations activations);
// The same with any cuBLASLt.
absl::StatusOr<std::unique_ptr<LayerKernels>> MakeCudaLayerKernelsWith(std::shared_ptr<cuda::Device> device,
                                                                       const cuda::CublasLtApi& api,
                                                                       Activations activations);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CUDA_CUDA_LAYER_KERNELS_H_
