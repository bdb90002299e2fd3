#ifndef EDUBA_COLLECTIVE_NCCL_NCCL_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_NCCL_NCCL_COMMUNICATOR_H_

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collective/communicator.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"
#include "collective/rendezvous.h"

namespace eduba {

struct NcclOptions {
  int device = 0;  // CUDA's number of it. Ranks need devices of their own (docs/adr/0005-gpu.md).
};

// Joins this rank to the others over NCCL and returns its Communicator. Rank 0 makes the group's secret
// unique id and leaves it at `rendezvous`, which is used only during the call.
//
// `data` of the calls is host memory: a call copies it to the device, reduces it there in one all-reduce (a
// second one for what exceeds the first frame) and copies it back. device_sums leaves out the copies, and
// runs the all-reduce on the caller's stream; an abort ends what is queued there too.
//
// What NCCL cannot promise of communicator.h: where its links are memory (NVLink, PCIe), a rank that dies or
// leaves is not told to the others, so their calls end with DEADLINE_EXCEEDED, or ABORTED when the
// coordinator tells them. An abort that has not returned after 2 s ends the process with 137, because nothing
// else can free the device then; a supervisor starts it anew.
//
//   INVALID_ARGUMENT     rank is not in [0, size)
//   FAILED_PRECONDITION  no CUDA in this build, no such device, no NCCL, or NCCL refused the group
//   DEADLINE_EXCEEDED    a rank did not come by `deadline`
//   UNAVAILABLE          the device or a connection failed
absl::StatusOr<std::unique_ptr<Communicator>> ConnectNccl(int rank, int size, Rendezvous& rendezvous,
                                                          const NcclOptions& options, absl::Time deadline);

// For tests: another NCCL, another GPU, and what to do when an abort is stuck.
struct NcclParts {
  const NcclApi* api = nullptr;
  std::unique_ptr<GpuStream> stream;
  int gpu = -1;  // CUDA's number of the device.
  absl::Duration abort_limit = absl::Seconds(2);
  std::function<void()> on_stuck_abort;  // Must not return to a service that goes on.
};
absl::StatusOr<std::unique_ptr<Communicator>> ConnectNcclForTest(int rank, int size, Rendezvous& rendezvous,
                                                                 NcclParts parts, absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_NCCL_COMMUNICATOR_H_
