#ifndef EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_
#define EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "collective/nccl/gpu_stream.h"
#include "collective/nccl/nccl_api.h"

namespace eduba {

// One non-blocking NCCL communicator, and the watchdog thread that looks after it. The watchdog asks NCCL for
// errors, keeps the deadlines of calls whose own thread may be stuck in CUDA, and is the only thread that
// aborts. An abort happens in this order, so that no call can meet freed memory:
//   1. failure() is set, so that everyone is told;
//   2. the last call into NCCL with this communicator has returned;
//   3. the communicator is aborted. A healthy abort may have to wait for the work that the device has to do
//      before the collective that is aborted. An abort that has not returned `abort_limit` after the end of
//      that work is stuck for good (NCCL's issues 863, 1013 and 1777 say how this happens), and
//      `on_stuck_abort` is called.
class NcclLink {
 public:
  NcclLink(const NcclApi& api, GpuStream& stream, absl::Duration abort_limit,
           std::function<void()> on_stuck_abort);
  // Gives NCCL half a second at most to send what is still queued, then aborts, and waits for the abort.
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  // Must be called once, before all else. Returns when the group has formed. FAILED_PRECONDITION when NCCL
  // refuses the group.
  absl::Status Join(int rank, int size, const NcclUniqueId& id, absl::Time deadline);

  // Queues an all-reduce in place on `stream`, and returns when NCCL has queued it. REQUIRES: the calling
  // thread is attached to the stream's device.
  absl::Status AllReduce(void* data, size_t count, NcclType type, NcclOperation operation, GpuStream& stream,
                         absl::Time deadline);

  // Queues a reduce-scatter in place. `parts` [ranks] are words in the device's memory: parts[r] becomes the
  // sum on rank r, and stays as it is on the other ranks. Otherwise like AllReduce.
  absl::Status ReduceScatter(absl::Span<const absl::Span<int64_t>> parts, GpuStream& stream,
                             absl::Time deadline);

  // Queues a message of `send_bytes` to rank `to` and one of `receive_bytes` from rank `from`. A message of 0
  // bytes is not sent. REQUIRES: the peers make calls of the same sizes. Otherwise like AllReduce.
  absl::Status SendReceive(const void* send, int64_t send_bytes, int64_t to, void* receive,
                           int64_t receive_bytes, int64_t from, absl::Time deadline);

  // A call is under way until EndCall. When NCCL reports an error meanwhile, the watchdog waits a moment for
  // the call, which may have all it needs already. The link fails a moment after `deadline`, wherever the
  // call's thread is then.
  void BeginCall(absl::Time deadline);
  // Says that NCCL's work for this call begins after the last mark of `stream`. Only the link asks about that
  // mark from now on.
  void SetEarlierWork(std::shared_ptr<GpuStream> stream);
  void EndCall();

  // The first error, or OK while there is none. May be called from any thread.
  absl::Status failure() const;
  // Ends the link, unless it has ended already. May be called from any thread.
  void Fail(const absl::Status& status);

 private:
  // Makes one NCCL group of the calls that `calls` passes to its argument, until one of them fails. Returns
  // NCCL's result.
  template <typename Calls>
  int InGroup(const Calls& calls);
  // Makes `call` with the communicator and returns NCCL's result; kNcclRemoteError when the communicator is
  // gone.
  int Ask(const std::function<int(NcclComm)>& call);
  // Waits until NCCL has done the call `what`, whose result so far is `result`.
  absl::Status WaitWhileInProgress(int result, const char* what, absl::Time deadline);
  // What an error of NCCL means to the caller.
  absl::Status ErrorOf(int result) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The watchdog thread: waits for the end of the link, then aborts the communicator.
  void Watch();
  void AwaitFailure();
  // The error that NCCL reports by itself, or kNcclSuccess; also where a call keeps NCCL busy.
  int AskForError();
  void AbortNow();

  const NcclApi& api_;
  GpuStream& stream_;
  const absl::Duration abort_limit_;
  const std::function<void()> on_stuck_abort_;

  Mutex nccl_mutex_;  // Held for every call into NCCL except the abort.
  NcclComm comm_ ABSL_GUARDED_BY(nccl_mutex_) = nullptr;

  mutable Mutex mutex_;
  CondVar changed_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  bool formed_ ABSL_GUARDED_BY(mutex_) = false;
  // These three describe the call under way. When the link fails they stay as they are then.
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  std::shared_ptr<GpuStream> earlier_work_ ABSL_GUARDED_BY(mutex_);  // Null: there is none.
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread watchdog_;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_NCCL_LINK_H_
