// Compares cublaslt_api.h with the cublasLt.h that the build found. Nothing here runs.
#include <cublasLt.h>

#include <cstddef>
#include <type_traits>

#include "kernels/cuda/cublaslt_api.h"

namespace eduba::cuda {
namespace {

static_assert(sizeof(CublasLtAlgorithm) == sizeof(cublasLtMatmulAlgo_t) &&
              alignof(CublasLtAlgorithm) == alignof(cublasLtMatmulAlgo_t));
static_assert(sizeof(CublasLtHeuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
              offsetof(CublasLtHeuristic, algorithm) == offsetof(cublasLtMatmulHeuristicResult_t, algo) &&
              offsetof(CublasLtHeuristic, workspace_bytes) ==
                  offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
              offsetof(CublasLtHeuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(kCublasLtSuccess == int{CUBLAS_STATUS_SUCCESS} && kCublasLtTransposed == int{CUBLAS_OP_T});
static_assert(kCublasLtF32 == int{CUDA_R_32F} && kCublasLtF16 == int{CUDA_R_16F} &&
              kCublasLtBf16 == int{CUDA_R_16BF});
static_assert(kCublasLtComputeF32 == int{CUBLAS_COMPUTE_32F} &&
              kCublasLtComputeF32Pedantic == int{CUBLAS_COMPUTE_32F_PEDANTIC});
static_assert(kCublasLtTransA == int{CUBLASLT_MATMUL_DESC_TRANSA} &&
              kCublasLtWorkspaceBytesMax == int{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES} &&
              kCublasLtReductionSchemes == int{CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK} &&
              kCublasLtSplits == int{CUBLASLT_ALGO_CONFIG_SPLITK_NUM} &&
              kCublasLtReduction == int{CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME} &&
              int{CUBLASLT_REDUCTION_SCHEME_NONE} == 0);

// The same functions but for the names of enums, which travel as int, and of handles, as void*.
static_assert(sizeof(cublasStatus_t) == sizeof(int) && sizeof(cudaDataType) == sizeof(int) &&
              sizeof(cublasComputeType_t) == sizeof(int) && sizeof(cublasOperation_t) == sizeof(int));
static_assert(std::is_same_v<decltype(cublasLtGetVersion), size_t()>);
static_assert(std::is_same_v<decltype(cublasLtCreate), cublasStatus_t(cublasLtHandle_t*)>);
static_assert(std::is_same_v<decltype(cublasLtDestroy), cublasStatus_t(cublasLtHandle_t)>);
static_assert(std::is_same_v<decltype(cublasLtMatmulDescCreate),
                             cublasStatus_t(cublasLtMatmulDesc_t*, cublasComputeType_t, cudaDataType_t)>);
static_assert(std::is_same_v<decltype(cublasLtMatmulDescSetAttribute),
                             cublasStatus_t(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*,
                                            size_t)>);
static_assert(
    std::is_same_v<decltype(cublasLtMatrixLayoutCreate),
                   cublasStatus_t(cublasLtMatrixLayout_t*, cudaDataType, uint64_t, uint64_t, int64_t)>);
static_assert(
    std::is_same_v<decltype(cublasLtMatmulPreferenceCreate), cublasStatus_t(cublasLtMatmulPreference_t*)>);
static_assert(std::is_same_v<decltype(cublasLtMatmulPreferenceSetAttribute),
                             cublasStatus_t(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                            const void*, size_t)>);
static_assert(
    std::is_same_v<decltype(cublasLtMatmulAlgoGetHeuristic),
                   cublasStatus_t(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                  cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t*, int*)>);
static_assert(std::is_same_v<decltype(cublasLtMatmulAlgoConfigGetAttribute),
                             cublasStatus_t(const cublasLtMatmulAlgo_t*, cublasLtMatmulAlgoConfigAttributes_t,
                                            void*, size_t, size_t*)>);
static_assert(
    std::is_same_v<decltype(cublasLtMatmul),
                   cublasStatus_t(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                                  cublasLtMatrixLayout_t, const void*, cublasLtMatrixLayout_t, const void*,
                                  const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t,
                                  const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t)>);

}  // namespace
}  // namespace eduba::cuda
