#include "coordinator/runtime.h"

#include <chrono>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

constexpr std::chrono::milliseconds kTick{100};

int64_t SteadyMs() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(since).count();
}

absl::Status ShuttingDown() {
  return absl::UnavailableError("the coordinator is shutting down: retry later");
}

}  // namespace

Runtime::Runtime(ClusterState::Options options, std::unique_ptr<Recorder> store, StoredState stored,
                 std::function<void(bool)> set_serving)
    : set_serving_(std::move(set_serving)),
      state_(std::move(options), std::move(stored)),
      writer_(std::move(store), [this](const RecordWriter::Written& written) { OnWritten(written); }),
      ticker_([this] { Ticks(); }) {}

Runtime::~Runtime() {
  Stop();
  ticker_.join();
}

void Runtime::Ticks() {
  const MutexLock lock(mutex_);
  while (!stopped_) {
    changed_.WaitFor(mutex_, kTick);
    if (stopped_) break;
    state_.Tick(clock_.At(SteadyMs()));
    CarryOut();
  }
}

void Runtime::Run(RequestId request, const Event& event) {
  event(state_, request, clock_.At(SteadyMs()));
  CarryOut();
}

void Runtime::CarryOut() {
  for (Effect& effect : state_.TakeEffects()) CarryOutOne(std::move(effect));
}

void Runtime::OnWritten(const RecordWriter::Written& written) {
  const MutexLock lock(mutex_);
  for (const auto& [id, status] : written) {
    if (!status.ok()) LogError(std::string(status.message()));
    if (stopped_) continue;
    state_.Persisted(id, status, clock_.At(SteadyMs()));
    CarryOut();
  }
}

void Runtime::CarryOutOne(Effect any) {
  std::visit(
      [this](auto&& effect) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        using T = std::decay_t<decltype(effect)>;
        if constexpr (std::is_same_v<T, SendToWorker>) {
          if (const auto it = links_.find(effect.worker); it != links_.end()) {
            it->second->Send(std::move(effect.message));
          }
        } else if constexpr (std::is_same_v<T, CloseWorker>) {
          if (const auto link = links_.extract(effect.worker); !link.empty()) {
            link.mapped()->Close(effect.status);
          }
        } else if constexpr (std::is_same_v<T, Reply>) {
          if (const auto caller = callers_.extract(effect.request); !caller.empty()) {
            caller.mapped()->OnReply(std::move(effect.answer));
            changed_.NotifyAll();
          }
        } else if constexpr (std::is_same_v<T, AttendStarted>) {
          if (const auto it = callers_.find(effect.request); it != callers_.end()) {
            it->second->OnStarted(effect);
          }
        } else if constexpr (std::is_same_v<T, AttendedRows>) {
          if (const auto it = callers_.find(effect.request); it != callers_.end()) {
            it->second->OnRows(std::move(effect.rows));
          }
        } else if constexpr (std::is_same_v<T, Generated>) {
          if (const auto it = callers_.find(effect.request); it != callers_.end()) {
            it->second->OnGenerated(std::move(effect.tokens));
          }
        } else if constexpr (std::is_same_v<T, Embedded>) {
          if (const auto it = callers_.find(effect.request); it != callers_.end()) {
            it->second->OnEmbedded(std::move(effect.rows));
          }
        } else if constexpr (std::is_same_v<T, Persist>) {
          writer_.Add(std::move(effect));
        } else if constexpr (std::is_same_v<T, ResetRendezvous>) {
          rendezvous_.Reset(effect.epoch, effect.attempt);
        } else if constexpr (std::is_same_v<T, SetServing>) {
          active_ = effect.serving;
          set_serving_(effect.serving);
          changed_.NotifyAll();
        } else {
          static_assert(std::is_same_v<T, Note>);
          LogInfo(effect.text);
        }
      },
      std::move(any));
}

absl::StatusOr<WorkerId> Runtime::AddWorker(WorkerLink* link) {
  const MutexLock lock(mutex_);
  if (stopped_) return ShuttingDown();
  const WorkerId id = next_worker_++;
  links_[id] = link;
  state_.WorkerConnected(id, clock_.At(SteadyMs()));
  CarryOut();
  return id;
}

void Runtime::WorkerSaid(WorkerId worker, v1::WorkerMessage message) {
  const MutexLock lock(mutex_);
  if (stopped_) return;
  state_.WorkerSaid(worker, std::move(message), clock_.At(SteadyMs()));
  CarryOut();
}

void Runtime::RemoveWorker(WorkerId worker, const std::string& why) {
  const MutexLock lock(mutex_);
  if (links_.erase(worker) == 0) return;
  state_.WorkerGone(worker, why, clock_.At(SteadyMs()));
  CarryOut();
}

RequestId Runtime::Start(Caller* caller, const Event& event) {
  const MutexLock lock(mutex_);
  if (draining_) {
    caller->OnReply(ShuttingDown());
    return 0;
  }
  if (callers_.size() >= kCallsMax) {
    caller->OnReply(absl::ResourceExhaustedError(
        absl::StrCat("the coordinator works on ", kCallsMax, " calls, the most it can: retry later")));
    return 0;
  }
  const RequestId id = next_request_++;
  callers_[id] = caller;
  Run(id, event);
  return id;
}

void Runtime::Continue(RequestId request, const Event& event) {
  const MutexLock lock(mutex_);
  if (callers_.count(request) > 0) Run(request, event);
}

void Runtime::Cancel(RequestId request) {
  const MutexLock lock(mutex_);
  if (callers_.erase(request) == 0) return;
  state_.Cancel(request, clock_.At(SteadyMs()));
  CarryOut();
  changed_.NotifyAll();
}

absl::Status Runtime::WaitUntilActive(absl::Time deadline) {
  const MutexLock lock(mutex_);
  const auto until = absl::ToChronoTime(deadline);
  while (!active_ && !stopped_) {
    if (!changed_.WaitUntil(mutex_, until)) break;
  }
  if (active_) return absl::OkStatus();
  if (stopped_) return ShuttingDown();
  return absl::DeadlineExceededError("the group of workers is not complete");
}

bool Runtime::Drain(absl::Time deadline) {
  const MutexLock lock(mutex_);
  draining_ = true;
  while (!callers_.empty()) {
    if (!changed_.WaitUntil(mutex_, absl::ToChronoTime(deadline))) break;
  }
  return callers_.empty();
}

void Runtime::Stop() {
  {
    const MutexLock lock(mutex_);
    if (!stopped_) EndAll();
  }
  writer_.Drain();
}

void Runtime::EndAll() {
  draining_ = true;
  stopped_ = true;
  active_ = false;
  for (const auto& [id, caller] : std::exchange(callers_, {})) caller->OnReply(ShuttingDown());
  for (const auto& [id, link] : std::exchange(links_, {})) link->Close(ShuttingDown());
  rendezvous_.Reset(0, 0);
  changed_.NotifyAll();
}

}  // namespace eduba
