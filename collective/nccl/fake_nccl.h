#ifndef EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_
#define EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_

#include <atomic>
#include <memory>

#include "absl/time/time.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"
#include "collective/nccl/nccl_communicator.h"

namespace eduba {

// NCCL and its GPU as the communicator sees them, between threads of a test: calls that are in progress and
// must be asked about, streams that run in order, all-reduces that end only when all ranks came, and that end
// without a result when they are aborted. An abort waits for what is ahead of its all-reduces.
struct FakeNccl {
  // Faults, for all groups of the process. Set back by a new Reset().
  std::atomic<bool> peers_are_told{true};   // As sockets do; false: as memory does.
  std::atomic<bool> abort_is_stuck{false};  // Aborts return only when this is false again.
  std::atomic<bool> call_is_stuck{false};   // So do all-reduces.
  std::atomic<int> async_error{0};          // What NCCL finds out by itself.
  std::atomic<int> all_reduce_result{0};    // What the call returns.
  std::atomic<const char*> last_error{""};  // What NCCL says of it.
  std::atomic<bool> device_fails{false};    // cudaEventQuery reports an error.
  std::atomic<int> look_takes_ms{0};        // How long cudaEventQuery takes.
  // cudaEventQuery waits until the stream is done, as it may while another thread frees memory.
  std::atomic<bool> looks_wait{false};
  std::atomic<int> aborts{0};  // Counted.

  void Reset();
};
FakeNccl& TheFakeNccl();

const NcclApi& FakeNcclApi();
std::unique_ptr<GpuStream> NewFakeStream();

// Parts for ConnectNcclForTest, whose stuck aborts end the process.
NcclParts FakeNcclParts();

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_
