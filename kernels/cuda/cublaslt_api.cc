#include "kernels/cuda/cublaslt_api.h"

#include <dlfcn.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace eduba::cuda {
namespace {

constexpr char kHowToInstall[] =
    "a model on a GPU needs cuBLASLt 12 or newer: install NVIDIA's package libcublas-12-9 or libcublas-13-0, "
    "or "
    "pip's nvidia-cublas-cu12 or nvidia-cublas with its lib folder in LD_LIBRARY_PATH, or use --device cpu";

template <typename Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

absl::StatusOr<CublasLtApi> Load() {
  std::string why;
  for (const char* const name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* const error = dlerror();
      if (why.empty()) why = error == nullptr ? name : error;
      continue;
    }
    CublasLtApi api;
    if (Find(library, "cublasLtGetVersion", api.get_version) && Find(library, "cublasLtCreate", api.create) &&
        Find(library, "cublasLtDestroy", api.destroy) &&
        Find(library, "cublasLtMatmulDescCreate", api.description_create) &&
        Find(library, "cublasLtMatmulDescDestroy", api.description_destroy) &&
        Find(library, "cublasLtMatmulDescSetAttribute", api.description_set) &&
        Find(library, "cublasLtMatrixLayoutCreate", api.layout_create) &&
        Find(library, "cublasLtMatrixLayoutDestroy", api.layout_destroy) &&
        Find(library, "cublasLtMatmulPreferenceCreate", api.preference_create) &&
        Find(library, "cublasLtMatmulPreferenceDestroy", api.preference_destroy) &&
        Find(library, "cublasLtMatmulPreferenceSetAttribute", api.preference_set) &&
        Find(library, "cublasLtMatmulAlgoGetHeuristic", api.get_heuristic) &&
        Find(library, "cublasLtMatmulAlgoConfigGetAttribute", api.algorithm_get) &&
        Find(library, "cublasLtMatmul", api.multiply)) {
      return api;
    }
    why = absl::StrCat(name, " lacks functions");
  }
  return absl::FailedPreconditionError(absl::StrCat("cuBLASLt: cannot load ", why, "; ", kHowToInstall));
}

}  // namespace

absl::StatusOr<const CublasLtApi*> LoadCublasLt() {
  static const absl::StatusOr<CublasLtApi>* const api = new absl::StatusOr<CublasLtApi>(Load());
  if (!api->ok()) return api->status();
  return &**api;
}

}  // namespace eduba::cuda
