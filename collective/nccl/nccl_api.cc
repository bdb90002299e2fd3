#include "collective/nccl/nccl_api.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr char kHowToInstall[] =
    "install NCCL 2.14 or newer (NVIDIA's package libnccl2, or pip's nvidia-nccl-cu12 or -cu13 with its lib "
    "folder in LD_LIBRARY_PATH), or use --transport gloo";
constexpr int kOldest = 21400;

// Up to 2.8 the number had one digit less for the minor version; those are too old in either reading.
std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

template <typename Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

absl::StatusOr<NcclApi> Load() {
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return absl::FailedPreconditionError(
        absl::StrCat("NCCL: cannot load ", why == nullptr ? kLibrary : why, "; ", kHowToInstall));
  }
  NcclApi api;
  int version = 0;
  if (!Find(library, "ncclGetVersion", api.get_version) || api.get_version(&version) != kNcclSuccess ||
      version < kOldest || !Find(library, "ncclGetErrorString", api.get_error_string) ||
      !Find(library, "ncclGetUniqueId", api.get_unique_id) ||
      !Find(library, "ncclCommInitRankConfig", api.comm_init_rank_config) ||
      !Find(library, "ncclCommGetAsyncError", api.comm_get_async_error) ||
      !Find(library, "ncclCommFinalize", api.comm_finalize) ||
      !Find(library, "ncclCommAbort", api.comm_abort) || !Find(library, "ncclAllReduce", api.all_reduce) ||
      !Find(library, "ncclReduce", api.reduce) || !Find(library, "ncclGroupStart", api.group_start) ||
      !Find(library, "ncclGroupEnd", api.group_end) || !Find(library, "ncclSend", api.send) ||
      !Find(library, "ncclRecv", api.receive)) {
    return absl::FailedPreconditionError(absl::StrCat("NCCL: ", kLibrary, " has version ",
                                                      VersionText(version), ", wanted 2.14 or newer; ",
                                                      kHowToInstall));
  }
  return api;
}

}  // namespace

absl::StatusOr<const NcclApi*> LoadNccl() {
  static const absl::StatusOr<NcclApi>* const api = new absl::StatusOr<NcclApi>(Load());
  if (!api->ok()) return api->status();
  return &**api;
}

std::string NcclVersionText(const NcclApi& api) {
  int version = 0;
  api.get_version(&version);
  return VersionText(version);
}

}  // namespace eduba
