// Compares nccl_api.h with the nccl.h that the build found. Nothing here runs.
#include <cstddef>
#include <type_traits>

#include "collective/nccl/nccl_api.h"
#include "nccl.h"

namespace eduba {
namespace {

static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId) && alignof(NcclUniqueId) == alignof(ncclUniqueId));
static_assert(std::is_same_v<NcclComm, ncclComm_t>);
static_assert(kNcclSuccess == int{ncclSuccess} && kNcclCudaError == int{ncclUnhandledCudaError} &&
              kNcclSystemError == int{ncclSystemError} && kNcclInvalidArgument == int{ncclInvalidArgument} &&
              kNcclInvalidUsage == int{ncclInvalidUsage} && kNcclRemoteError == int{ncclRemoteError} &&
              kNcclInProgress == int{ncclInProgress});
static_assert(kNcclInt8 == int{ncclInt8} && kNcclInt32 == int{ncclInt32} && kNcclInt64 == int{ncclInt64});
static_assert(kNcclSum == int{ncclSum} && kNcclMax == int{ncclMax});
static_assert(offsetof(NcclConfig, size) == offsetof(ncclConfig_t, size) &&
              offsetof(NcclConfig, magic) == offsetof(ncclConfig_t, magic) &&
              offsetof(NcclConfig, version) == offsetof(ncclConfig_t, version) &&
              offsetof(NcclConfig, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(NCCL_VERSION(2, 14, 0) == 21400 && NCCL_CONFIG_UNDEF_INT == INT_MIN);

// Whether two functions are the same when enums count as int.
static_assert(sizeof(ncclResult_t) == sizeof(int) && sizeof(ncclDataType_t) == sizeof(int) &&
              sizeof(ncclRedOp_t) == sizeof(int));
static_assert(std::is_same_v<decltype(ncclCommInitRankConfig),
                             ncclResult_t(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*)>);
static_assert(std::is_same_v<decltype(ncclAllReduce), ncclResult_t(const void*, void*, size_t, ncclDataType_t,
                                                                   ncclRedOp_t, ncclComm_t, cudaStream_t)>);
static_assert(std::is_same_v<decltype(ncclReduce), ncclResult_t(const void*, void*, size_t, ncclDataType_t,
                                                                ncclRedOp_t, int, ncclComm_t, cudaStream_t)>);
static_assert(std::is_same_v<decltype(ncclSend), ncclResult_t(const void*, size_t, ncclDataType_t, int,
                                                              ncclComm_t, cudaStream_t)>);
static_assert(std::is_same_v<decltype(ncclRecv),
                             ncclResult_t(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t)>);
static_assert(std::is_same_v<decltype(ncclGroupStart), ncclResult_t()>);
static_assert(std::is_same_v<decltype(ncclGroupEnd), ncclResult_t()>);
static_assert(std::is_same_v<decltype(ncclGetUniqueId), ncclResult_t(ncclUniqueId*)>);
static_assert(std::is_same_v<decltype(ncclCommGetAsyncError), ncclResult_t(ncclComm_t, ncclResult_t*)>);
static_assert(std::is_same_v<decltype(ncclCommFinalize), ncclResult_t(ncclComm_t)>);
static_assert(std::is_same_v<decltype(ncclCommAbort), ncclResult_t(ncclComm_t)>);
static_assert(std::is_same_v<decltype(ncclGetVersion), ncclResult_t(int*)>);
static_assert(std::is_same_v<decltype(ncclGetErrorString), const char*(ncclResult_t)>);
static_assert(std::is_same_v<decltype(ncclGetLastError), const char*(ncclComm_t)>);

}  // namespace
}  // namespace eduba
