#ifndef EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_
#define EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_

#include <atomic>
#include <memory>

#include "absl/time/time.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"
#include "collective/nccl/nccl_communicator.h"

namespace eduba {

// Emulates NCCL and its GPU, as the communicator sees them, between threads of a test:
// - a call is "in progress" until somebody asks about it;
// - the work on a stream runs in order;
// - an all-reduce ends when all ranks have come, or without a result when it is aborted;
// - an abort waits for the work that is on the stream before its all-reduces.
struct FakeNccl {
  // Faults, for all groups of the process. Reset() clears them.
  std::atomic<bool> peers_are_told{
      true};  // Whether the others learn that a rank left: sockets tell, memory does not.
  std::atomic<bool> abort_is_stuck{false};  // An abort does not return before this is false again.
  std::atomic<bool> call_is_stuck{false};   // An all-reduce does not return before this is false again.
  std::atomic<int> async_error{0};          // The error that NCCL finds by itself.
  std::atomic<int> all_reduce_result{0};    // What an all-reduce returns.
  std::atomic<const char*> last_error{""};  // NCCL's last warning.
  std::atomic<bool> device_fails{false};    // cudaEventQuery reports an error.
  // cudaEventQuery answers only after an abort has begun and ended.
  std::atomic<bool> looks_wait_for_abort{false};
  // cudaEventQuery waits until the stream is done, as it may while another thread frees memory.
  std::atomic<bool> looks_wait{false};

  // Counters of what has happened.
  std::atomic<int> looks{0};            // Calls of cudaEventQuery that have begun.
  std::atomic<int> waits{0};            // Times that an all-reduce was found to wait for a rank.
  std::atomic<int> aborts{0};           // Aborts that have begun.
  std::atomic<int> finished_aborts{0};  // Aborts that have ended.

  void Reset();
};
FakeNccl& TheFakeNccl();

const NcclApi& FakeNcclApi();
std::unique_ptr<GpuStream> NewFakeStream();

// Parts for ConnectNcclForTest. A stuck abort ends the process.
NcclParts FakeNcclParts();

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_FAKE_NCCL_H_
