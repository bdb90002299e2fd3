#ifndef EDUBA_COLLECTIVE_NCCL_NCCL_API_H_
#define EDUBA_COLLECTIVE_NCCL_NCCL_API_H_

#include <climits>
#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

// The part of NCCL that we use. It is declared here so that the program builds without NCCL and loads it when
// it runs. Wherever nccl.h is installed, nccl_api_check.cc compares every line with it. The interfaces are
// those of NCCL 2.14, which later releases keep (the configuration carries its own size and version).
struct ncclComm;  // NOLINT: NCCL's name.

namespace eduba {

using NcclComm = ncclComm*;

// A secret that is never logged: whoever has it can join the group.
struct NcclUniqueId {
  char internal[128];
};

enum NcclResult : int {
  kNcclSuccess = 0,
  kNcclCudaError = 1,
  kNcclSystemError = 2,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7,
};
enum NcclType : int { kNcclInt8 = 0, kNcclInt32 = 2, kNcclInt64 = 4 };
enum NcclOperation : int { kNcclSum = 0, kNcclMax = 2 };

struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21400;  // Tells the library to fill in all that came after `blocking`.
  int blocking = 0;
  int unused = INT_MIN;  // NCCL's "undefined": a later version has its next field here.
};

// Every function returns a NcclResult unless it says otherwise. Streams are cudaStream_t.
struct NcclApi {
  int (*get_version)(int* version) = nullptr;
  const char* (*get_error_string)(int result) = nullptr;
  int (*get_unique_id)(NcclUniqueId* id) = nullptr;
  int (*comm_init_rank_config)(NcclComm* comm, int ranks, NcclUniqueId id, int rank,
                               NcclConfig* config) = nullptr;
  int (*comm_get_async_error)(NcclComm comm, int* error) = nullptr;
  int (*comm_finalize)(NcclComm comm) = nullptr;
  int (*comm_abort)(NcclComm comm) = nullptr;
  int (*all_reduce)(const void* send, void* receive, size_t count, int type, int operation, NcclComm comm,
                    void* stream) = nullptr;
  int (*reduce)(const void* send, void* receive, size_t count, int type, int operation, int root,
                NcclComm comm, void* stream) = nullptr;
  int (*group_start)() = nullptr;
  int (*group_end)() = nullptr;
  int (*send)(const void* data, size_t count, int type, int peer, NcclComm comm, void* stream) = nullptr;
  int (*receive)(void* data, size_t count, int type, int peer, NcclComm comm, void* stream) = nullptr;
  // Returns the last error of the process, whatever communicator is passed. Null in a library without it.
  const char* (*get_last_error)(NcclComm comm) = nullptr;
};

// Loads libnccl.so.2 of this machine at the first call, and never unloads it. FAILED_PRECONDITION where it is
// missing or older than 2.14; the text says how to install it.
absl::StatusOr<const NcclApi*> LoadNccl();
// Like LoadNccl, but loads another library, at every call.
absl::StatusOr<NcclApi> LoadNcclForTest(const char* library);

// "2.28.9"
std::string NcclVersionText(const NcclApi& api);

// What a result means, and what NCCL last warned of, in one line.
std::string NcclErrorText(const NcclApi& api, int result);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_NCCL_API_H_
