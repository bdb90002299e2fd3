#include "collective/nccl/nccl_link.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace eduba {
namespace {

constexpr auto kWatchBusy = std::chrono::milliseconds(5);
constexpr auto kWatchIdle = std::chrono::milliseconds(100);
// What a call under way may take to end well once NCCL has reported that a peer is gone.
constexpr auto kGrace = std::chrono::milliseconds(100);
constexpr absl::Duration kLeaveLimit = absl::Milliseconds(500);
constexpr absl::Duration kAskAgain = absl::Microseconds(50);

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
  return WaitWhileInProgress(result, "forming the group", deadline);
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
  while (true) {
    // A peer with the same deadline may have given up a moment before us.
    const bool late = absl::Now() >= deadline;
    if (const absl::Status failed = failure(); !failed.ok()) {
      return late && absl::IsUnavailable(failed) ? absl::DeadlineExceededError(failed.message()) : failed;
    }
    if (result == kNcclSuccess) return absl::OkStatus();
    if (result != kNcclInProgress && !late) {
      Fail(absl::UnavailableError(absl::StrCat(what, ": ", ErrorText(result))));
      return failure();
    }
    if (late) {
      Fail(absl::DeadlineExceededError(absl::StrCat(what, ": not all ranks came in time")));
      return failure();
    }
    absl::SleepFor(kAskAgain);
    int state = kNcclSuccess;
    result = Ask([&](NcclComm comm) { return api_.comm_get_async_error(comm, &state); });
    if (result == kNcclSuccess) result = state;
  }
}

std::string NcclLink::ErrorText(int result) const {
  return absl::StrCat(
      "a rank is gone, or its device or connection broke (NCCL: ", api_.get_error_string(result), ")");
}

void NcclLink::SetBusy(bool busy) {
  const std::scoped_lock lock(mutex_);
  busy_ = busy;
  changed_.notify_all();
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
    changed_.wait_for(lock, busy_ ? kWatchBusy : kWatchIdle);
    if (!failure_.ok() || stopping_) break;
    lock.unlock();
    int state = kNcclSuccess;
    bool joined = false;
    const int result = Ask([&](NcclComm comm) {
      joined = true;
      return api_.comm_get_async_error(comm, &state);
    });
    const int error = result == kNcclSuccess ? state : result;
    lock.lock();
    if (!joined || error == kNcclSuccess || error == kNcclInProgress || !failure_.ok()) continue;
    changed_.wait_for(lock, kGrace, [this] { return !busy_ || stopping_ || !failure_.ok(); });
    if (failure_.ok()) failure_ = absl::UnavailableError(ErrorText(error));
  }
  lock.unlock();
  AbortNow();
}

void NcclLink::AbortNow() {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
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
  {
    std::unique_lock lock(mutex);
    if (!changed.wait_for(lock, absl::ToChronoMilliseconds(abort_limit_), [&] { return done; })) {
      lock.unlock();
      on_stuck_abort_();
    }
  }
  aborter.join();
}

}  // namespace eduba
