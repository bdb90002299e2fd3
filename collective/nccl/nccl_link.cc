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
// What a call under way may take to end well once NCCL has reported that a peer is gone.
constexpr auto kGrace = std::chrono::milliseconds(100);
// The call's own thread keeps its deadline; when it has not by then, it is inside CUDA.
constexpr absl::Duration kLate = absl::Milliseconds(50);
constexpr absl::Duration kLeaveLimit = absl::Milliseconds(500);
// NCCL is done with most calls in tens of microseconds. One that takes longer than this lets the processor go
// between two looks.
constexpr absl::Duration kSpin = absl::Microseconds(200);
constexpr absl::Duration kAskAgain = absl::Microseconds(50);
constexpr auto kAskAhead = std::chrono::milliseconds(5);
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
    // The last call's words may still be on their way to a peer, through a thread of NCCL in this process.
    const int result = Ask([this](NcclComm comm) { return api_.comm_finalize(comm); });
    WaitWhileInProgress(result, "leaving", absl::Now() + kLeaveLimit).IgnoreError();
  }
  Fail(absl::AbortedError("this rank has left the group"));
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  watchdog_.join();
}

absl::Status NcclLink::Join(int rank, int size, const NcclUniqueId& id, absl::Time deadline) {
  NcclConfig config;
  int result = kNcclSuccess;
  {
    const std::scoped_lock lock(nccl_mutex_);
    result = api_.comm_init_rank_config(&comm_, size, id, rank, &config);
  }
  absl::Status status = WaitWhileInProgress(result, "forming the group", deadline);
  const std::scoped_lock lock(mutex_);
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

// Parts differ in size, which ncclReduceScatter does not know; in one group, NCCL works on all of them at the
// same time.
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
    // Neither waits for the other.
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
  const std::scoped_lock lock(nccl_mutex_);
  return comm_ == nullptr ? int{kNcclRemoteError} : call(comm_);
}

absl::Status NcclLink::WaitWhileInProgress(int result, const char* what, absl::Time deadline) {
  const absl::Time spin_until = absl::Now() + kSpin;
  while (true) {
    // A peer with the same deadline may have given up a moment before us.
    const absl::Time now = absl::Now();
    const bool late = now >= deadline;
    if (const absl::Status failed = failure(); !failed.ok()) {
      return late && absl::IsUnavailable(failed) ? absl::DeadlineExceededError(failed.message()) : failed;
    }
    if (result == kNcclSuccess) return absl::OkStatus();
    if (result != kNcclInProgress && !late) {
      const std::scoped_lock lock(mutex_);
      if (failure_.ok()) failure_ = Annotate(ErrorOf(result), what);
      changed_.notify_all();
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
  // Only of this machine's own trouble: NCCL's last warning may be of a group before.
  if ((result == kNcclCudaError || result == kNcclSystemError) && absl::StrContains(text, "out of memory")) {
    return absl::ResourceExhaustedError(
        absl::StrCat("NCCL finds no memory (", text, "); give the workers a smaller --memory-bytes"));
  }
  return absl::UnavailableError(
      absl::StrCat("a rank is gone, or its device or connection broke (NCCL: ", text, ")"));
}

// Neither wakes the watchdog: it would ask NCCL just when the call wants to.
void NcclLink::BeginCall(absl::Time deadline) {
  const std::scoped_lock lock(mutex_);
  if (!failure_.ok()) return;
  busy_ = true;
  deadline_ = deadline;
}

void NcclLink::SetAhead(std::shared_ptr<GpuStream> stream) {
  const std::scoped_lock lock(mutex_);
  if (failure_.ok()) ahead_ = std::move(stream);
}

void NcclLink::EndCall() {
  const std::scoped_lock lock(mutex_);
  if (!failure_.ok()) return;
  busy_ = false;
  deadline_ = absl::InfiniteFuture();
  ahead_ = nullptr;
}

absl::Status NcclLink::failure() const {
  const std::scoped_lock lock(mutex_);
  return failure_;
}

void NcclLink::Fail(const absl::Status& status) {
  const std::scoped_lock lock(mutex_);
  if (failure_.ok()) failure_ = status;
  changed_.notify_all();
}

void NcclLink::Watch() {
  stream_.Attach().IgnoreError();  // An error shows in the calls that need it.
  std::unique_lock lock(mutex_);
  while (failure_.ok() && !stopping_) {
    changed_.wait_for(lock, kWatch);
    if (!failure_.ok() || stopping_) break;
    if (absl::Now() >= deadline_ + kLate) {
      failure_ = absl::DeadlineExceededError("not all ranks came in time");
      break;
    }
    lock.unlock();
    int error = kNcclSuccess;
    {
      // A call may be stuck inside NCCL, and still has its deadline.
      const std::unique_lock nccl(nccl_mutex_, std::try_to_lock);
      if (nccl.owns_lock() && comm_ != nullptr) {
        const int result = api_.comm_get_async_error(comm_, &error);
        if (result != kNcclSuccess) error = result;
      }
    }
    lock.lock();
    if (error == kNcclSuccess || error == kNcclInProgress || !failure_.ok()) continue;
    changed_.wait_for(lock, kGrace, [this] { return !busy_ || stopping_ || !failure_.ok(); });
    if (failure_.ok()) failure_ = ErrorOf(error);
  }
  lock.unlock();
  AbortNow();
}

void NcclLink::AbortNow() {
  std::shared_ptr<GpuStream> ahead;
  absl::Time latest;
  {
    const std::scoped_lock lock(mutex_);
    ahead = ahead_;
    latest = deadline_;
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  bool is_clear = ahead == nullptr;
  std::thread aborter([&] {
    stream_.Attach().IgnoreError();
    NcclComm comm = nullptr;
    {
      const std::scoped_lock lock(nccl_mutex_);  // Waits for a call into NCCL, within the limit.
      comm = std::exchange(comm_, nullptr);
    }
    if (comm != nullptr) api_.comm_abort(comm);
    const std::scoped_lock lock(mutex);
    done = true;
    changed.notify_all();
  });
  // On a thread of its own: CUDA may let this question wait for what only the abort can end, and the clock
  // has to go on.
  std::thread asker([&] {
    if (ahead == nullptr) return;
    stream_.Attach().IgnoreError();
    while (true) {
      const absl::StatusOr<bool> reached = ahead->Reached();
      std::unique_lock lock(mutex);
      is_clear = !reached.ok() || *reached;
      if (is_clear) changed.notify_all();
      if (is_clear || changed.wait_for(lock, kAskAhead, [&] { return done; })) return;
    }
  });
  {
    std::unique_lock lock(mutex);
    const absl::Duration most = std::clamp(latest - absl::Now(), absl::ZeroDuration(), kLongest);
    changed.wait_for(lock, absl::ToChronoMilliseconds(most), [&] { return done || is_clear; });
    if (!changed.wait_for(lock, absl::ToChronoMilliseconds(abort_limit_), [&] { return done; })) {
      lock.unlock();
      on_stuck_abort_();
    }
  }
  aborter.join();
  asker.join();
}

}  // namespace eduba
