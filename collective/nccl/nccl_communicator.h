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
  int device =
      0;  // CUDA's number of the device. Every rank needs a device of its own (docs/adr/0005-gpu.md).
};

// Joins this rank to the others over NCCL and returns its Communicator. Rank 0 makes the group's secret
// unique id and leaves it in the rendezvous store, which is used only during the call.
//
// The `data` of the calls is host memory. A call copies it to the device, reduces it there in one all-reduce
// (and more for the words that exceed the first frame) and copies it back. device_sums makes no copies: it
// runs the all-reduce on the caller's stream. An abort ends what is queued there too.
//
// NCCL cannot keep all that communicator.h promises. Where its links are memory (NVLink, PCIe), the others
// are not told of a rank that dies or leaves, so their calls end with DEADLINE_EXCEEDED, or with ABORTED when
// the coordinator tells them. An abort that has not returned after 2 s ends the process with exit code 137,
// because nothing else can free the device then. A supervisor has to start the process again.
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
  std::function<void()> on_stuck_abort;  // A service must not continue after it.
};
absl::StatusOr<std::unique_ptr<Communicator>> ConnectNcclForTest(int rank, int size, Rendezvous& rendezvous,
                                                                 NcclParts parts, absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_NCCL_COMMUNICATOR_H_
