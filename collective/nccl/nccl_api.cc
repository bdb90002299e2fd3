#include "collective/nccl/nccl_api.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace eduba {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr char kHowToInstall[] =
    "install NCCL 2.14 or newer (NVIDIA's package libnccl2, or pip's nvidia-nccl-cu12 or -cu13 with its lib "
    "folder in LD_LIBRARY_PATH), or use --transport gloo";
constexpr int kOldest = 21400;

// Up to NCCL 2.8 the number has one digit less for the minor version. Those releases are too old however it
// is read.
std::string VersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

template <typename Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

absl::Status Unfit(const char* name, const std::string& why) {
  return absl::FailedPreconditionError(absl::StrCat("NCCL: ", name, " ", why, "; ", kHowToInstall));
}

absl::StatusOr<NcclApi> Load(const char* name) {
  void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return Unfit(name, absl::StrCat("cannot be loaded (", why == nullptr ? "dlopen" : why, ")"));
  }
  NcclApi api;
  int version = 0;
  if (!Find(library, "ncclGetVersion", api.get_version) || api.get_version(&version) != kNcclSuccess) {
    return Unfit(name, "does not say its version");
  }
  if (version < kOldest) return Unfit(name, absl::StrCat("has version ", VersionText(version)));
  if (!Find(library, "ncclGetErrorString", api.get_error_string) ||
      !Find(library, "ncclGetUniqueId", api.get_unique_id) ||
      !Find(library, "ncclCommInitRankConfig", api.comm_init_rank_config) ||
      !Find(library, "ncclCommGetAsyncError", api.comm_get_async_error) ||
      !Find(library, "ncclCommFinalize", api.comm_finalize) ||
      !Find(library, "ncclCommAbort", api.comm_abort) || !Find(library, "ncclAllReduce", api.all_reduce) ||
      !Find(library, "ncclReduce", api.reduce) || !Find(library, "ncclGroupStart", api.group_start) ||
      !Find(library, "ncclGroupEnd", api.group_end) || !Find(library, "ncclSend", api.send) ||
      !Find(library, "ncclRecv", api.receive)) {
    return Unfit(name, absl::StrCat("of version ", VersionText(version), " lacks functions"));
  }
  Find(library, "ncclGetLastError", api.get_last_error);
  return api;
}

}  // namespace

absl::StatusOr<const NcclApi*> LoadNccl() {
  static const absl::StatusOr<NcclApi>* const api = new absl::StatusOr<NcclApi>(Load(kLibrary));
  if (!api->ok()) return api->status();
  return &**api;
}

absl::StatusOr<NcclApi> LoadNcclForTest(const char* library) { return Load(library); }

std::string NcclVersionText(const NcclApi& api) {
  int version = 0;
  api.get_version(&version);
  return VersionText(version);
}

std::string NcclErrorText(const NcclApi& api, int result) {
  const char* const last = api.get_last_error == nullptr ? nullptr : api.get_last_error(nullptr);
  std::string text = api.get_error_string(result);
  if (last != nullptr && *last != 0) absl::StrAppend(&text, ": ", last);
  return absl::StrReplaceAll(text, {{"\n", " "}});
}

}  // namespace eduba
