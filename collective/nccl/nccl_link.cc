#include "collective/nccl/nccl_link.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr auto kWatch = std::chrono::milliseconds(10);
// The time that a call under way still has to end well after NCCL has reported that a peer is gone.
constexpr auto kGrace = std::chrono::milliseconds(100);
// A call's own thread keeps the call's deadline. When the call is this late, its thread is stuck inside CUDA.
constexpr absl::Duration kLate = absl::Milliseconds(50);
constexpr absl::Duration kLeaveLimit = absl::Milliseconds(500);
// NCCL is done with most calls in tens of microseconds. The wait for a call that takes longer than this gives
// up the processor between two looks.
constexpr absl::Duration kSpin = absl::Microseconds(200);
constexpr absl::Duration kAskAgain = absl::Microseconds(50);
constexpr auto kAskEarlierWork = std::chrono::milliseconds(5);
// Longer than any call, for those without a deadline.
constexpr absl::Duration kLongest = absl::Hours(1);

}  // namespace

NcclLink::NcclLink(const NcclApi& api, GpuStream& stream, absl::Duration abort_limit,
                   std::function<void()> on_stuck_abort)
    : api_(api),
      stream_(stream),
      abort_limit_(abort_limit),
      on_stuck_abort_(std::move(on_stuck_abort)),
      watchdog_([this] { Watch(); }) {}

NcclLink::~NcclLink() {
  if (failure().ok()) {
    // A thread of NCCL in this process may still be sending the last call's words to a peer.
    const int result = Ask([this](NcclComm comm) { return api_.comm_finalize(comm); });
    WaitWhileInProgress(result, "leaving", absl::Now() + kLeaveLimit).IgnoreError();
  }
  Fail(absl::AbortedError("this rank has left the group"));
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  watchdog_.join();
}

absl::Status NcclLink::Join(int rank, int size, const NcclUniqueId& id, absl::Time deadline) {
  NcclConfig config;
  int result = kNcclSuccess;
  {
    MutexLock lock(nccl_mutex_);
    result = api_.comm_init_rank_config(&comm_, size, id, rank, &config);
  }
  absl::Status status = WaitWhileInProgress(result, "forming the group", deadline);
  MutexLock lock(mutex_);
  formed_ = status.ok();
  return status;
}

absl::Status NcclLink::AllReduce(void* data, size_t count, NcclType type, NcclOperation operation,
                                 GpuStream& stream, absl::Time deadline) {
  const int result = Ask([&](NcclComm comm) {
    return api_.all_reduce(data, data, count, type, operation, comm, stream.handle());
  });
  return WaitWhileInProgress(result, "all-reduce", deadline);
}

// The parts differ in size, which ncclReduceScatter cannot do. So each part is one reduce, and all are in one
// group, so that NCCL works on them at the same time.
absl::Status NcclLink::ReduceScatter(absl::Span<const absl::Span<int64_t>> parts, GpuStream& stream,
                                     absl::Time deadline) {
  const int result = Ask([&](NcclComm comm) {
    return InGroup([&](const auto& queue) {
      for (int root = 0; root < static_cast<int>(parts.size()); ++root) {
        if (parts[root].empty()) continue;
        queue([&] {
          return api_.reduce(parts[root].data(), parts[root].data(), parts[root].size(), kNcclInt64, kNcclSum,
                             root, comm, stream.handle());
        });
      }
    });
  });
  return WaitWhileInProgress(result, "reduce-scatter", deadline);
}

absl::Status NcclLink::SendReceive(const void* send, int64_t send_bytes, int64_t to, void* receive,
                                   int64_t receive_bytes, int64_t from, absl::Time deadline) {
  const int result = Ask([&](NcclComm comm) {
    // They are in one group, so that neither waits for the other.
    return InGroup([&](const auto& queue) {
      if (send_bytes > 0) {
        queue([&] {
          return api_.send(send, send_bytes, kNcclInt8, static_cast<int>(to), comm, stream_.handle());
        });
      }
      if (receive_bytes > 0) {
        queue([&] {
          return api_.receive(receive, receive_bytes, kNcclInt8, static_cast<int>(from), comm,
                              stream_.handle());
        });
      }
    });
  });
  return WaitWhileInProgress(result, "send and receive", deadline);
}

template <typename Calls>
int NcclLink::InGroup(const Calls& calls) {
  const auto failed = [](int code) { return code != kNcclSuccess && code != kNcclInProgress; };
  int code = api_.group_start();
  if (failed(code)) return code;
  calls([&](const auto& call) {
    if (!failed(code)) code = call();
  });
  const int ended = api_.group_end();  // A group that has begun has to end.
  return failed(code) ? code : ended;
}

int NcclLink::Ask(const std::function<int(NcclComm)>& call) {
  MutexLock lock(nccl_mutex_);
  return comm_ == nullptr ? int{kNcclRemoteError} : call(comm_);
}

absl::Status NcclLink::WaitWhileInProgress(int result, const char* what, absl::Time deadline) {
  const absl::Time spin_until = absl::Now() + kSpin;
  while (true) {
    // A peer with the same deadline may have given up a moment earlier.
    const absl::Time now = absl::Now();
    const bool late = now >= deadline;
    if (const absl::Status failed = failure(); !failed.ok()) {
      return late && absl::IsUnavailable(failed) ? absl::DeadlineExceededError(failed.message()) : failed;
    }
    if (result == kNcclSuccess) return absl::OkStatus();
    if (result != kNcclInProgress && !late) {
      MutexLock lock(mutex_);
      if (failure_.ok()) failure_ = Annotate(ErrorOf(result), what);
      changed_.NotifyAll();
      return failure_;
    }
    if (late) {
      Fail(absl::DeadlineExceededError(absl::StrCat(what, ": not all ranks came in time")));
      return failure();
    }
    if (now < spin_until) {
      std::this_thread::yield();
    } else {
      absl::SleepFor(kAskAgain);
    }
    int state = kNcclSuccess;
    result = Ask([&](NcclComm comm) { return api_.comm_get_async_error(comm, &state); });
    if (result == kNcclSuccess) result = state;
  }
}

absl::Status NcclLink::ErrorOf(int result) const {
  const std::string text = NcclErrorText(api_, result);
  if (!formed_ && (result == kNcclInvalidArgument || result == kNcclInvalidUsage)) {
    return absl::FailedPreconditionError(
        absl::StrCat("NCCL refuses this group (", text,
                     "); it wants a GPU for each worker: where some share one, start the coordinator and its "
                     "workers with --transport gloo"));
  }
  // NCCL's last warning may be of an earlier group, so it counts only for trouble of this machine itself.
  if ((result == kNcclCudaError || result == kNcclSystemError) && absl::StrContains(text, "out of memory")) {
    return absl::ResourceExhaustedError(
        absl::StrCat("NCCL finds no memory (", text, "); give the workers a smaller --memory-bytes"));
  }
  return absl::UnavailableError(
      absl::StrCat("a rank is gone, or its device or connection broke (NCCL: ", text, ")"));
}

// BeginCall and EndCall do not wake the watchdog, which would ask NCCL just when the call wants to.
void NcclLink::BeginCall(absl::Time deadline) {
  MutexLock lock(mutex_);
  if (!failure_.ok()) return;
  busy_ = true;
  deadline_ = deadline;
}

void NcclLink::SetEarlierWork(std::shared_ptr<GpuStream> stream) {
  MutexLock lock(mutex_);
  if (failure_.ok()) earlier_work_ = std::move(stream);
}

void NcclLink::EndCall() {
  MutexLock lock(mutex_);
  if (!failure_.ok()) return;
  busy_ = false;
  deadline_ = absl::InfiniteFuture();
  earlier_work_ = nullptr;
}

absl::Status NcclLink::failure() const {
  MutexLock lock(mutex_);
  return failure_;
}

void NcclLink::Fail(const absl::Status& status) {
  MutexLock lock(mutex_);
  if (failure_.ok()) failure_ = status;
  changed_.NotifyAll();
}

int NcclLink::AskForError() {
  // A call may be stuck inside NCCL. The watchdog must not wait for it, because it keeps that call's
  // deadline.
  if (!nccl_mutex_.TryLock()) return kNcclSuccess;
  int error = kNcclSuccess;
  if (comm_ != nullptr) {
    const int result = api_.comm_get_async_error(comm_, &error);
    if (result != kNcclSuccess) error = result;
  }
  nccl_mutex_.Unlock();
  return error;
}

// Returns when the link has failed or is being destroyed.
void NcclLink::AwaitFailure() {
  MutexLock lock(mutex_);
  while (failure_.ok() && !stopping_) {
    changed_.WaitFor(mutex_, kWatch);
    if (!failure_.ok() || stopping_) return;
    if (absl::Now() >= deadline_ + kLate) {
      failure_ = absl::DeadlineExceededError("not all ranks came in time");
      return;
    }
    lock.Unlock();
    const int error = AskForError();
    lock.Lock();
    if (error == kNcclSuccess || error == kNcclInProgress || !failure_.ok()) continue;
    const auto until = std::chrono::steady_clock::now() + kGrace;
    while (busy_ && !stopping_ && failure_.ok() && changed_.WaitUntil(mutex_, until)) {
    }
    if (failure_.ok()) failure_ = ErrorOf(error);
  }
}

void NcclLink::Watch() {
  stream_.Attach().IgnoreError();  // An error shows in the calls that need the device.
  AwaitFailure();
  AbortNow();
}

namespace {

// How far an abort has come, for the threads that work on it.
struct AbortProgress {
  Mutex mutex;
  CondVar changed;
  bool is_done ABSL_GUARDED_BY(mutex) = false;
  bool is_earlier_work_over ABSL_GUARDED_BY(mutex) = false;
};

// Asks whether the work before the collective is over, until it is or the abort is done.
void WatchEarlierWork(GpuStream& work, AbortProgress& progress) {
  while (true) {
    const absl::StatusOr<bool> reached = work.Reached();
    MutexLock lock(progress.mutex);
    progress.is_earlier_work_over = !reached.ok() || *reached;
    if (progress.is_earlier_work_over) {
      progress.changed.NotifyAll();
      return;
    }
    const auto until = std::chrono::steady_clock::now() + kAskEarlierWork;
    while (!progress.is_done && progress.changed.WaitUntil(progress.mutex, until)) {
    }
    if (progress.is_done) return;
  }
}

// Waits for the abort: until `latest` or the end of the earlier work, and `limit` after that. False: it is
// stuck.
bool AwaitAbort(AbortProgress& progress, absl::Time latest, absl::Duration limit) {
  using Clock = std::chrono::steady_clock;
  const absl::Duration most = std::clamp(latest - absl::Now(), absl::ZeroDuration(), kLongest);
  const auto latest_begin = Clock::now() + absl::ToChronoNanoseconds(most);
  MutexLock lock(progress.mutex);
  while (!progress.is_done && !progress.is_earlier_work_over &&
         progress.changed.WaitUntil(progress.mutex, latest_begin)) {
  }
  const auto end = Clock::now() + absl::ToChronoNanoseconds(limit);
  while (!progress.is_done && progress.changed.WaitUntil(progress.mutex, end)) {
  }
  return progress.is_done;
}

}  // namespace

void NcclLink::AbortNow() {
  std::shared_ptr<GpuStream> earlier_work;
  absl::Time latest;
  {
    MutexLock lock(mutex_);
    earlier_work = earlier_work_;
    latest = deadline_;
  }
  AbortProgress progress;
  {
    MutexLock lock(progress.mutex);
    progress.is_earlier_work_over = earlier_work == nullptr;
  }
  std::thread aborter([&] {
    stream_.Attach().IgnoreError();
    NcclComm comm = nullptr;
    {
      MutexLock lock(nccl_mutex_);  // Waits for a call into NCCL, within the limit.
      comm = std::exchange(comm_, nullptr);
    }
    if (comm != nullptr) api_.comm_abort(comm);
    MutexLock lock(progress.mutex);
    progress.is_done = true;
    progress.changed.NotifyAll();
  });
  // CUDA may not answer this question before the abort has ended the collective. So a thread of its own asks
  // it, and this thread keeps the time.
  std::thread asker([&] {
    if (earlier_work == nullptr) return;
    stream_.Attach().IgnoreError();
    WatchEarlierWork(*earlier_work, progress);
  });
  if (!AwaitAbort(progress, latest, abort_limit_)) on_stuck_abort_();
  aborter.join();
  asker.join();
}

}  // namespace eduba
