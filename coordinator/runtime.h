#ifndef EDUBA_COORDINATOR_RUNTIME_H_
#define EDUBA_COORDINATOR_RUNTIME_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "coordinator/effects.h"
#include "coordinator/record_writer.h"
#include "coordinator/recorder.h"
#include "coordinator/rendezvous_store.h"
#include "coordinator/running_clock.h"
#include "coordinator/state.h"

namespace eduba {

// Who waits for a request. Called with the runtime's mutex held: must neither block nor call the runtime.
class Caller {
 public:
  virtual ~Caller() = default;
  virtual void OnStarted(const AttendStarted& /*started*/) {}
  virtual void OnRows(v1::AttendResponse::Rows&& /*rows*/) {}
  virtual void OnGenerated(v1::GenerateResponse::Tokens&& /*tokens*/) {}
  virtual void OnEmbedded(v1::EmbedResponse&& /*rows*/) {}
  // Last.
  virtual void OnReply(absl::StatusOr<Answer> answer) = 0;
};

// The way to one worker. Called as a Caller is.
class WorkerLink {
 public:
  virtual ~WorkerLink() = default;
  virtual void Send(std::shared_ptr<const v1::GroupMessage> message) = 0;
  // Last.
  virtual void Close(const absl::Status& status) = 0;
};

// Runs one ClusterState: one mutex around it, a clock that stands while we do, a thread that writes down, a
// thread that ticks; hands events in and carries effects out. Nothing waits for the disk with the mutex held.
// Thread-safe.
class Runtime {
 public:
  using Event = std::function<void(ClusterState& state, RequestId request, int64_t now_ms)>;

  // `set_serving` is called with the mutex held, whenever a group becomes active or ends.
  Runtime(ClusterState::Options options, std::unique_ptr<Recorder> store, StoredState stored,
          std::function<void(bool)> set_serving);
  // Calls Stop.
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // `link` must live until RemoveWorker returns, or Close was called. UNAVAILABLE after Stop.
  absl::StatusOr<WorkerId> AddWorker(WorkerLink* link);
  void WorkerSaid(WorkerId worker, v1::WorkerMessage message);
  void RemoveWorker(WorkerId worker, const std::string& why);

  // Begins a request with `event`, whose reply may come before this returns. `caller` must live until it has
  // its reply or Cancel returned. After Drain the reply is UNAVAILABLE; RESOURCE_EXHAUSTED when there are
  // kCallsMax requests. Ids only grow; 0: the request was refused.
  RequestId Start(Caller* caller, const Event& event);
  // A further event of a request that may have ended already.
  void Continue(RequestId request, const Event& event);
  void Cancel(RequestId request);

  RendezvousStore& rendezvous() { return rendezvous_; }

  // Waits until a group is active.
  absl::Status WaitUntilActive(absl::Time deadline);
  // Takes no new requests and waits until those under way have ended. False: not all have at `deadline`.
  bool Drain(absl::Time deadline);
  // Ends all requests and all workers' streams with UNAVAILABLE, and returns when all changes that were asked
  // for are written down. Idempotent.
  void Stop();

 private:
  void Ticks();
  void Run(RequestId request, const Event& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CarryOut() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CarryOutOne(Effect effect) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnWritten(const RecordWriter::Written& written);

  const std::function<void(bool)> set_serving_;
  RendezvousStore rendezvous_;

  Mutex mutex_;
  CondVar changed_;
  RunningClock clock_ ABSL_GUARDED_BY(mutex_);
  ClusterState state_ ABSL_GUARDED_BY(mutex_);
  std::map<WorkerId, WorkerLink*> links_ ABSL_GUARDED_BY(mutex_);
  std::map<RequestId, Caller*> callers_ ABSL_GUARDED_BY(mutex_);
  WorkerId next_worker_ ABSL_GUARDED_BY(mutex_) = 1;
  RequestId next_request_ ABSL_GUARDED_BY(mutex_) = 1;
  bool active_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;

  RecordWriter writer_;
  std::thread ticker_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RUNTIME_H_
