#ifndef EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_
#define EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"

namespace eduba {

// One non-blocking NCCL communicator, and the thread that watches over it: it asks NCCL for errors, keeps the
// deadlines of calls whose own thread may be stuck in CUDA, and is the only one that aborts. The order is:
// first everyone is told (failure()), then nobody is inside NCCL with this communicator any more, then it is
// aborted; so no call can meet freed memory. An abort waits for what the device had to do before the
// collective that it ends, in good health. One that has not returned `abort_limit` after that is stuck for
// good (NCCL's issues 863, 1013 and 1777 have the ways), and `on_stuck_abort` is called.
class NcclLink {
 public:
  NcclLink(const NcclApi& api, GpuStream& stream, absl::Duration abort_limit,
           std::function<void()> on_stuck_abort);
  // Sends what is still queued, for half a second at most, then aborts. Waits for it.
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  // Once, before all else. Returns when the group has formed. FAILED_PRECONDITION when NCCL refuses it.
  absl::Status Join(int rank, int size, const NcclUniqueId& id, absl::Time deadline);

  // Queues an all-reduce in place on `stream`; returns when NCCL has queued it. The calling thread is
  // attached.
  absl::Status AllReduce(void* data, size_t count, NcclType type, NcclOperation operation, GpuStream& stream,
                         absl::Time deadline);

  // Queues the sums of `parts` [ranks], words of the device, each to the rank whose it is, in place. The
  // other ranks' parts stay as they are. Otherwise as AllReduce.
  absl::Status ReduceScatter(absl::Span<const absl::Span<int64_t>> parts, GpuStream& stream,
                             absl::Time deadline);

  // Queues `send_bytes` of `send` for rank `to` and `receive_bytes` from rank `from`, which does its part
  // with as many; 0: not. Otherwise as AllReduce.
  absl::Status SendReceive(const void* send, int64_t send_bytes, int64_t to, void* receive,
                           int64_t receive_bytes, int64_t from, absl::Time deadline);

  // A call is under way until EndCall: an error that NCCL reports waits a moment for the call, which may have
  // all it needs already, and the link fails a moment after `deadline`, wherever the call's thread is then.
  void BeginCall(absl::Time deadline);
  // The call's work for NCCL comes behind the last mark of `stream`, which nobody else asks about.
  void SetAhead(std::shared_ptr<GpuStream> stream);
  void EndCall();

  // The first error; OK while there is none. Any thread.
  absl::Status failure() const;
  // Ends the link, unless it has ended. Any thread.
  void Fail(const absl::Status& status);

 private:
  // NCCL's answer to one group of the calls that `calls` hands to its argument: they are made until one
  // fails.
  template <typename Calls>
  int InGroup(const Calls& calls);
  // NCCL's answer to `call`, made with the communicator; kNcclRemoteError without one.
  int Ask(const std::function<int(NcclComm)>& call);
  // Until NCCL has done what it was asked to.
  absl::Status WaitWhileInProgress(int result, const char* what, absl::Time deadline);
  // What NCCL's error means. Under mutex_.
  absl::Status ErrorOf(int result) const;
  void Watch();
  void AbortNow();

  const NcclApi& api_;
  GpuStream& stream_;
  const absl::Duration abort_limit_;
  const std::function<void()> on_stuck_abort_;

  std::mutex nccl_mutex_;    // Held for every call into NCCL but the abort.
  NcclComm comm_ = nullptr;  // Guarded by nccl_mutex_.

  mutable std::mutex mutex_;  // Guards all below but the thread.
  std::condition_variable changed_;
  absl::Status failure_;
  bool formed_ = false;
  // Of the call under way. What they are when the link fails, they stay.
  bool busy_ = false;
  absl::Time deadline_ = absl::InfiniteFuture();
  std::shared_ptr<GpuStream> ahead_;  // Null: nothing of this rank's is ahead.
  bool stopping_ = false;
  std::thread watchdog_;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_
