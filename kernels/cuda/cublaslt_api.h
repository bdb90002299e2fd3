#ifndef EDUBA_KERNELS_CUDA_CUBLASLT_API_H_
#define EDUBA_KERNELS_CUDA_CUBLASLT_API_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"

// What we use of cuBLASLt, declared here so that the program builds without it and loads it when it runs.
// cublaslt_api_check.cc compares every line with cublasLt.h wherever that is found. The same in CUDA 12
// and 13.
namespace eduba::cuda {

struct CublasLtAlgorithm {
  uint64_t data[8];
};
struct CublasLtHeuristic {
  CublasLtAlgorithm algorithm;
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

enum CublasLtResult : int { kCublasLtSuccess = 0 };
enum CublasLtType : int { kCublasLtF32 = 0, kCublasLtF16 = 2, kCublasLtBf16 = 14 };
enum CublasLtCompute : int {
  kCublasLtComputeF32 = 68,          // Products of 16-bit numbers, sums in f32.
  kCublasLtComputeF32Pedantic = 69,  // Products of f32 as they are, whatever the environment says.
};
inline constexpr int kCublasLtTransposed = 1;
inline constexpr int kCublasLtTransA = 3;             // An attribute of a product's description.
inline constexpr int kCublasLtWorkspaceBytesMax = 1;  // An attribute of a preference.
inline constexpr int kCublasLtReductionSchemes = 3;
inline constexpr int kCublasLtSplits = 2;  // An attribute of an algorithm.
inline constexpr int kCublasLtReduction = 3;

// Every function returns a CublasLtResult unless it says otherwise.
struct CublasLtApi {
  size_t (*get_version)() = nullptr;  // 130100: 13.1.0
  int (*create)(void** handle) = nullptr;
  int (*destroy)(void* handle) = nullptr;
  int (*description_create)(void** description, int compute, int scale_type) = nullptr;
  int (*description_destroy)(void* description) = nullptr;
  int (*description_set)(void* description, int attribute, const void* value, size_t bytes) = nullptr;
  int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) = nullptr;
  int (*layout_destroy)(void* layout) = nullptr;
  int (*preference_create)(void** preference) = nullptr;
  int (*preference_destroy)(void* preference) = nullptr;
  int (*preference_set)(void* preference, int attribute, const void* value, size_t bytes) = nullptr;
  int (*get_heuristic)(void* handle, void* description, void* a, void* b, void* c, void* d, void* preference,
                       int wanted, CublasLtHeuristic* results, int* found) = nullptr;
  int (*algorithm_get)(const CublasLtAlgorithm* algorithm, int attribute, void* value, size_t bytes,
                       size_t* written) = nullptr;
  // d = alpha op(a) b + beta c, columns one after another; queued on `stream`, a cudaStream_t.
  int (*multiply)(void* handle, void* description, const void* alpha, const void* a, void* a_layout,
                  const void* b, void* b_layout, const void* beta, const void* c, void* c_layout, void* d,
                  void* d_layout, const CublasLtAlgorithm* algorithm, void* workspace, size_t workspace_bytes,
                  void* stream) = nullptr;
};

// libcublasLt.so.13 or .12 of this machine, opened at the first call and never closed. FAILED_PRECONDITION
// where there is none, with how to install it.
absl::StatusOr<const CublasLtApi*> LoadCublasLt();

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_CUBLASLT_API_H_
