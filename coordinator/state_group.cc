// ClusterState: membership, epochs, and the ordered command stream.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/pages.h"
#include "coordinator/state.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// After an epoch ends: time for the news of a dead worker's broken stream to come in, so that the next group
// is not formed with it.
constexpr int64_t kReformDelayMs = 200;
constexpr int64_t kAttemptDelayMs = 100;  // doubles with every failed attempt
constexpr int64_t kAttemptDelayMaxMs = 2000;
// Workers answer within the timeout that they were given; this much later they are not going to.
constexpr int64_t kAnswerGraceMs = 2000;
// Multiply-adds that a rank gets through in a millisecond however slow it is: a twentieth of one slow core.
// Whoever is slower than that is taken for hung although its heart beats.
constexpr int64_t kSlowestWorkPerMs = (int64_t{1} << 28) / 1000;

absl::Status ResultStatus(const v1::CommandResult& result) {
  return result.code() == 0 ? absl::OkStatus()
                            : absl::Status(static_cast<absl::StatusCode>(result.code()), result.message());
}

// The communicator is dead on every rank after one of these.
bool BreaksGroup(int code) {
  const auto status = static_cast<absl::StatusCode>(code);
  return status == absl::StatusCode::kUnavailable || status == absl::StatusCode::kDeadlineExceeded ||
         status == absl::StatusCode::kAborted;
}

}  // namespace

ClusterState::ClusterState(Options options, StoredState stored) : options_(std::move(options)) {
  EDUBA_CHECK(options_.group_size >= 1 && options_.group_size <= kMaxGroupSize);
  epoch_ = stored.epoch;
  next_session_id_ = stored.next_session_id;
  for (SessionRecord& record : stored.sessions) {
    session_names_[record.id] = record.name;
    SessionEntry& session = sessions_[record.name];
    session.spec = std::make_shared<const v1::SessionSpec>(record.spec);
    if (record.length() > 0) session.lost = "the coordinator was started anew";
    session.record = std::move(record);
  }
}

ClusterState::WorkerEntry* ClusterState::FindWorker(WorkerId worker) {
  const auto it = workers_.find(worker);
  return it == workers_.end() ? nullptr : &it->second;
}

std::string ClusterState::NameOf(const WorkerEntry& worker) const {
  if (worker.rank < 0) return absl::StrCat("worker ", worker.hello.address());
  return absl::StrCat("worker ", worker.rank, " (", worker.hello.address(), ")");
}

int ClusterState::Greeted() const {
  return static_cast<int>(std::count_if(workers_.begin(), workers_.end(),
                                        [](const auto& entry) { return entry.second.greeted; }));
}

std::vector<ClusterState::WorkerEntry*> ClusterState::Ranks() {
  std::vector<WorkerEntry*> ranks(options_.group_size, nullptr);
  for (auto& [id, worker] : workers_) {
    if (worker.rank >= 0) ranks[worker.rank] = &worker;
  }
  return ranks;
}

void ClusterState::WorkerConnected(WorkerId id, int64_t now_ms) {
  WorkerEntry& worker = workers_[id];
  worker.id = id;
  worker.heard_ms = now_ms;
}

void ClusterState::WorkerSaid(WorkerId id, v1::WorkerMessage message, int64_t now_ms) {
  WorkerEntry* worker = FindWorker(id);
  if (worker == nullptr) return;
  worker->heard_ms = now_ms;
  if (!worker->greeted && message.kind_case() != v1::WorkerMessage::kHello) {
    Refuse(id, absl::FailedPreconditionError("the first message of Join must be `hello`"));
    return;
  }
  switch (message.kind_case()) {
    case v1::WorkerMessage::kHello:
      if (worker->greeted) return Expel(id, "said hello twice", now_ms);
      return Greet(worker, std::move(*message.mutable_hello()), now_ms);
    case v1::WorkerMessage::kHeartbeat:
      worker->memory_used_bytes = message.heartbeat().memory_used_bytes();
      for (const uint64_t append : message.heartbeat().appends()) KeepAppend(append, now_ms);
      return;
    case v1::WorkerMessage::kFormed:
      return OnFormed(worker, message.formed(), now_ms);
    case v1::WorkerMessage::kResult:
      return OnResult(worker, std::move(*message.mutable_result()), now_ms);
    case v1::WorkerMessage::kProgress:
      return OnModelProgress(worker, std::move(*message.mutable_progress()), now_ms);
    case v1::WorkerMessage::KIND_NOT_SET:
      return Expel(id, "sent an empty message", now_ms);
  }
}

void ClusterState::WorkerGone(WorkerId id, const std::string& why, int64_t now_ms) {
  RemoveWorker(id, why, now_ms);
}

void ClusterState::Greet(WorkerEntry* worker, v1::WorkerHello hello, int64_t now_ms) {
  const WorkerId id = worker->id;
  if (hello.protocol() != kGroupProtocol) {
    return Refuse(id, absl::FailedPreconditionError(absl::StrCat(
                          "worker ", hello.address(), " speaks protocol ", hello.protocol(), " (version ",
                          hello.version(), "), the coordinator ", kGroupProtocol, " (version ",
                          options_.version, "): start both from the same version")));
  }
  if (hello.transport() != options_.transport) {
    return Refuse(id, absl::FailedPreconditionError(
                          absl::StrCat("worker ", hello.address(), " joins groups over '", hello.transport(),
                                       "', this coordinator's workers over '", options_.transport,
                                       "': start both with the same --transport")));
  }
  // A worker that has come again before its old stream was seen to break.
  WorkerId old = 0;
  for (const auto& [other_id, other] : workers_) {
    if (other.greeted && other.hello.incarnation() == hello.incarnation()) old = other_id;
  }
  if (old != 0) {
    Emit(CloseWorker{old, absl::UnavailableError("the worker has joined anew")});
    RemoveWorker(old, "it joined anew", now_ms);
  }
  for (const auto& [other_id, other] : workers_) {
    if (!other.greeted) continue;
    if (other.hello.address() == hello.address()) {
      return Refuse(id, absl::UnavailableError(absl::StrCat(
                            "another worker with the address ", hello.address(),
                            " is there: come again when it has left, or give each its own --listen")));
    }
    if (other.hello.fingerprint() != hello.fingerprint()) {
      return Refuse(id, absl::FailedPreconditionError(
                            absl::StrCat("worker ", hello.address(), " (", hello.backend(),
                                         ") is refused: its arithmetic differs from that of ",
                                         other.hello.address(), " (", other.hello.backend(),
                                         "): another kind of CPU or GPU, another library or build; answers "
                                         "would not be the same bits. Use equal machines and one build")));
    }
    if (other.hello.has_model() != hello.has_model() || other.hello.model().hash() != hello.model().hash() ||
        other.hello.model().tokenizer_hash() != hello.model().tokenizer_hash() ||
        other.hello.model().session_defaults().SerializeAsString() !=
            hello.model().session_defaults().SerializeAsString()) {
      const auto held = [](const v1::WorkerHello& h) {
        return h.has_model() ? absl::StrCat("model ", h.model().name()) : std::string("no model");
      };
      return Refuse(id, absl::FailedPreconditionError(
                            absl::StrCat("worker ", hello.address(), " is refused: it holds ", held(hello),
                                         ", and ", other.hello.address(), " holds ", held(other.hello),
                                         ", with other weights, another configuration, another tokenizer or "
                                         "another streaming.json: give all workers of a group one --model")));
    }
  }
  if (Greeted() >= options_.group_size) {
    return Refuse(id, absl::UnavailableError(absl::StrCat("the group has its ", options_.group_size,
                                                          " workers already: come again later")));
  }
  worker->hello = std::move(hello);
  worker->greeted = true;
  Emit(Note{absl::StrCat(NameOf(*worker), " joined: ", worker->hello.backend(), ", ", worker->hello.threads(),
                         " threads; ", Greeted(), " of ", options_.group_size, " workers")});
  TryForm(now_ms);
}

void ClusterState::Refuse(WorkerId id, absl::Status status) {
  workers_.erase(id);
  Emit(Note{absl::StrCat("refused: ", std::string(status.message()))});
  Emit(CloseWorker{id, std::move(status)});
}

void ClusterState::Expel(WorkerId id, const std::string& why, int64_t now_ms) {
  const WorkerEntry* worker = FindWorker(id);
  if (worker == nullptr) return;
  Emit(CloseWorker{id, absl::InternalError(absl::StrCat(NameOf(*worker), " ", why))});
  RemoveWorker(id, absl::StrCat("it ", why), now_ms);
}

void ClusterState::RemoveWorker(WorkerId id, const std::string& why, int64_t now_ms) {
  const auto it = workers_.find(id);
  if (it == workers_.end()) return;
  const WorkerEntry worker = std::move(it->second);
  workers_.erase(it);
  if (!worker.greeted) return;
  const std::string text = absl::StrCat(NameOf(worker), " left: ", why);
  if (worker.rank >= 0) return EndEpoch(text, now_ms);
  Emit(Note{absl::StrCat(text, "; ", Greeted(), " of ", options_.group_size, " workers")});
}

void ClusterState::TryForm(int64_t now_ms) {
  if (phase_ == Phase::kForming && attempt_ == 0 && now_ms >= form_at_ms_) return StartAttempt(now_ms);
  if (phase_ != Phase::kWaiting || Greeted() < options_.group_size || now_ms < form_at_ms_) return;
  ++epoch_;
  phase_ = Phase::kRecording;
  Write(EpochBegun{epoch_}, epoch_);
}

void ClusterState::StartAttempt(int64_t now_ms) {
  attempt_ = next_attempt_;
  form_late_ms_ = now_ms + options_.form_timeout_ms + kAnswerGraceMs;
  Emit(ResetRendezvous{epoch_, attempt_});
  for (WorkerEntry* worker : Ranks()) {
    worker->formed = false;
    auto message = std::make_shared<v1::GroupMessage>();
    v1::FormGroup* form = message->mutable_form();
    form->set_epoch(epoch_);
    form->set_attempt(attempt_);
    form->set_rank(worker->rank);
    form->set_size(options_.group_size);
    form->set_timeout_ms(options_.form_timeout_ms);
    Emit(SendToWorker{worker->id, std::move(message)});
  }
}

void ClusterState::AttemptFailed(const std::string& why, int64_t now_ms) {
  Emit(Note{absl::StrCat("epoch ", epoch_, ", attempt ", attempt_, " to form a group failed: ", why)});
  form_at_ms_ = now_ms + std::min(kAttemptDelayMaxMs, kAttemptDelayMs << std::min<uint32_t>(attempt_, 10));
  attempt_ = 0;
  ++next_attempt_;
  Emit(ResetRendezvous{0, 0});  // Ranks that still wait for an address stop.
}

void ClusterState::OnFormed(WorkerEntry* worker, const v1::GroupFormed& formed, int64_t now_ms) {
  if (phase_ != Phase::kForming || formed.epoch() != epoch_ || attempt_ == 0 ||
      formed.attempt() != attempt_) {
    return;
  }
  if (formed.code() != 0) return AttemptFailed(absl::StrCat(NameOf(*worker), ": ", formed.message()), now_ms);
  worker->formed = true;
  const std::vector<WorkerEntry*> ranks = Ranks();
  if (std::all_of(ranks.begin(), ranks.end(), [](const WorkerEntry* w) { return w->formed; })) {
    Activate(now_ms);
  }
}

void ClusterState::Activate(int64_t now_ms) {
  phase_ = Phase::kActive;
  next_ordinal_ = 1;
  next_append_ = 1;
  for (auto& [name, session] : sessions_) {
    if (session.phase == SessionPhase::kReady && session.lost.empty()) OpenOnWorkers(&session, now_ms);
  }
  Emit(SetServing{true});
  Emit(Note{absl::StrCat("epoch ", epoch_, " is active with ", options_.group_size, " workers")});
}

void ClusterState::EndEpoch(const std::string& why, int64_t now_ms) {
  const std::string text = absl::StrCat(why, "; epoch ", epoch_, " is over");
  for (auto& [id, worker] : workers_) {
    if (worker.rank < 0) continue;
    worker.rank = -1;
    auto message = std::make_shared<v1::GroupMessage>();
    message->mutable_abort()->set_epoch(epoch_);
    message->mutable_abort()->set_reason(why);
    Emit(SendToWorker{id, std::move(message)});
  }
  if (phase_ == Phase::kActive) Emit(SetServing{false});
  phase_ = Phase::kWaiting;
  attempt_ = 0;
  form_at_ms_ = now_ms + kReformDelayMs;
  Emit(ResetRendezvous{0, 0});

  commands_.clear();
  again_.clear();
  steps_in_flight_ = 0;
  const absl::Status status = absl::UnavailableError(absl::StrCat(text, ": retry the whole call"));
  while (!calls_.empty()) FailCall(calls_.begin()->first, status);
  for (const auto& [ordinal, job] : std::exchange(model_jobs_, {})) Respond(job.request, status);
  while (!appends_.empty()) {
    for (const RequestId waiter : std::exchange(appends_.begin()->second.waiters, {})) {
      Respond(waiter, status);
    }
    ForgetAppend(appends_.begin()->first);
  }
  SessionsLoseTheirEpoch(text);
  Emit(Note{text});
}

absl::Status ClusterState::CheckActive() const {
  if (phase_ == Phase::kActive) return absl::OkStatus();
  const int greeted = Greeted();
  if (greeted < options_.group_size) {
    return absl::UnavailableError(absl::StrCat("the group has ", greeted, " of ", options_.group_size,
                                               " workers: start the missing ones, then retry"));
  }
  return absl::UnavailableError(
      absl::StrCat("the group of ", options_.group_size, " workers is forming: retry in a moment"));
}

void ClusterState::Command(PendingCommand pending, v1::Command command, int64_t now_ms,
                           const std::function<void(int rank, v1::Command* own)>& share) {
  EDUBA_CHECK(phase_ == Phase::kActive);
  const uint64_t ordinal = next_ordinal_++;
  command.set_epoch(epoch_);
  command.set_ordinal(ordinal);
  command.set_timeout_ms(TimeoutMs(pending));
  auto message = std::make_shared<v1::GroupMessage>();
  *message->mutable_command() = std::move(command);
  pending.results.resize(options_.group_size);
  pending.missing = options_.group_size;
  pending.sent_ms = now_ms;
  if (pending.kind == CommandKind::kAttend) pending.message = message;
  commands_.emplace(ordinal, std::move(pending));
  for (const WorkerEntry* worker : Ranks()) {
    if (share == nullptr) {
      Emit(SendToWorker{worker->id, message});
    } else {
      auto own = std::make_shared<v1::GroupMessage>(*message);
      share(worker->rank, own->mutable_command());
      Emit(SendToWorker{worker->id, std::move(own)});
    }
  }
}

int64_t ClusterState::TimeoutMs(const PendingCommand& command) const {
  return options_.operation_timeout_ms + command.work / kSlowestWorkPerMs;
}

// Workers take commands one after another, so only the first that is unanswered can be late, and its time
// began when the one before it was answered.
void ClusterState::ExpelLate(int64_t now_ms) {
  const auto first = std::find_if(commands_.begin(), commands_.end(),
                                  [](const auto& entry) { return entry.second.missing > 0; });
  if (first == commands_.end()) return;
  const auto& [ordinal, command] = *first;
  if (now_ms <= std::max(command.sent_ms, answered_ms_) + TimeoutMs(command) + kAnswerGraceMs) return;
  for (const WorkerEntry* worker : Ranks()) {
    if (command.results[worker->rank].has_value()) continue;
    const WorkerId id = worker->id;
    const std::string why = absl::StrCat("did not answer command ", ordinal, " in time");
    Emit(CloseWorker{id, absl::UnavailableError(absl::StrCat("the worker ", why))});
    return RemoveWorker(id, absl::StrCat("it ", why),
                        now_ms);  // The epoch is over, and with it the commands.
  }
}

void ClusterState::OnResult(WorkerEntry* worker, v1::CommandResult result, int64_t now_ms) {
  // Late answers of an epoch that is over (ABORTED, mostly) are of no interest.
  if (phase_ != Phase::kActive || result.epoch() != epoch_ || worker->rank < 0) return;
  const auto it = commands_.find(result.ordinal());
  if (it == commands_.end() || it->second.results[worker->rank].has_value()) {
    return Expel(worker->id, absl::StrCat("answered command ", result.ordinal(), ", which it was not asked"),
                 now_ms);
  }
  PendingCommand& command = it->second;
  if (BreaksGroup(result.code())) {
    return EndEpoch(absl::StrCat(NameOf(*worker), " reported: ", result.message()), now_ms);
  }
  command.results[worker->rank] = std::move(result);
  if (--command.missing > 0) return;
  answered_ms_ = now_ms;
  if (command.kind != CommandKind::kAttend) {
    const PendingCommand complete = std::move(command);
    commands_.erase(it);
    return Completed(complete, now_ms);
  }
  // Steps are delivered in order, because a call's rows may lie in several.
  for (;;) {
    const auto first = std::find_if(commands_.begin(), commands_.end(), [](const auto& entry) {
      return entry.second.kind == CommandKind::kAttend;
    });
    if (first == commands_.end() || first->second.missing > 0) return;
    const PendingCommand complete = std::move(first->second);
    commands_.erase(first);
    OnStep(complete, now_ms);
  }
}

void ClusterState::Completed(const PendingCommand& command, int64_t now_ms) {
  switch (command.kind) {
    case CommandKind::kOpenSession:
      return OnOpened(command, now_ms);
    case CommandKind::kCloseSession:
      return OnClosed(command.subject);
    case CommandKind::kBeginAppend:
      return OnBegun(command, now_ms);
    case CommandKind::kSealAppend:
      return OnSealed(command, now_ms);
    case CommandKind::kCommitAppend:
      return OnPublished(command, now_ms);
    case CommandKind::kModelJob:
      return OnModelJob(command, now_ms);
    case CommandKind::kAbortAppend:
    case CommandKind::kAttend:
    case CommandKind::kCancelJob:
      return;
  }
}

absl::Status ClusterState::FirstFailure(const PendingCommand& command) {
  for (const WorkerEntry* worker : Ranks()) {
    const absl::Status status = ResultStatus(*command.results[worker->rank]);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat(NameOf(*worker), ": ", std::string(status.message())));
    }
  }
  return absl::OkStatus();
}

void ClusterState::ListWorkers(RequestId request) {
  v1::ListWorkersResponse response;
  response.set_epoch(epoch_);
  response.set_state(phase_ == Phase::kActive ? "active" : phase_ == Phase::kWaiting ? "waiting" : "forming");
  response.set_group_size(options_.group_size);
  response.set_transport(options_.transport);
  response.set_version(options_.version);
  for (const auto& [id, entry] : workers_) {
    if (!entry.greeted) continue;
    v1::Worker* worker = response.add_workers();
    worker->set_rank(entry.rank);
    worker->set_address(entry.hello.address());
    worker->set_incarnation(entry.hello.incarnation());
    worker->set_backend(entry.hello.backend());
    worker->set_threads(entry.hello.threads());
    worker->set_memory_bytes(entry.hello.memory_bytes());
    worker->set_memory_used_bytes(entry.memory_used_bytes);
    worker->set_state(phase_ == Phase::kActive ? "ready" : "joining");
  }
  Respond(request, Answer(std::move(response)));
}

void ClusterState::Cancel(RequestId request, int64_t now_ms) {
  if (calls_.erase(request) > 0) {
    batcher_.Close(request);
    return;
  }
  for (auto& [ordinal, job] : model_jobs_) {
    if (job.request != request) continue;
    job.request = 0;
    return CancelModelJob(ordinal, now_ms);
  }
  for (auto& [session_id, recording] : recording_jobs_) {
    if (recording.first.request == request) recording.first.request = 0;
  }
  for (auto& [name, session] : sessions_) {
    if (session.waiter == request) session.waiter = 0;
  }
  for (auto& [id, append] : appends_) {
    if (std::erase(append.waiters, request) == 0) continue;
    if (append.phase == AppendPhase::kBeginning) Undo(id, absl::CancelledError(), now_ms);
    return;
  }
}

void ClusterState::Persisted(uint64_t id, const absl::Status& status, int64_t now_ms) {
  const auto it = writes_.find(id);
  EDUBA_CHECK(it != writes_.end());
  const PendingWrite write = std::move(it->second);
  writes_.erase(it);
  if (std::holds_alternative<SessionCreated>(write.change)) {
    return OnSessionRecorded(write.subject, status, now_ms);
  }
  if (std::holds_alternative<SessionErased>(write.change)) {
    return OnSessionErased(write.subject, status, now_ms);
  }
  if (const auto* append = std::get_if<AppendCommitted>(&write.change)) {
    return OnAppendRecorded(*append, write.subject, status, now_ms);
  }
  EDUBA_CHECK(phase_ == Phase::kRecording);
  if (!status.ok() || Greeted() < options_.group_size) {
    if (!status.ok()) {
      Emit(Note{absl::StrCat("cannot begin epoch ", epoch_, ": ", std::string(status.message()))});
    }
    phase_ = Phase::kWaiting;
    form_at_ms_ = now_ms + kAttemptDelayMaxMs;
    return;
  }
  phase_ = Phase::kForming;
  next_attempt_ = 1;
  int rank = 0;
  for (auto& [worker_id, worker] : workers_) {
    if (worker.greeted) worker.rank = rank++;
  }
  StartAttempt(now_ms);
}

void ClusterState::Tick(int64_t now_ms) {
  std::vector<WorkerId> silent;
  for (const auto& [id, worker] : workers_) {
    // Workers of this process are there for as long as we are; silent they are only when all of us lack CPU.
    if (options_.transport == "local") break;
    if (now_ms - worker.heard_ms > kHeartbeatTimeoutMs) silent.push_back(id);
  }
  for (const WorkerId id : silent) {
    const std::string why = absl::StrCat("silent for ", kHeartbeatTimeoutMs, " ms");
    Emit(CloseWorker{id, absl::UnavailableError(absl::StrCat("the worker was ", why))});
    RemoveWorker(id, why, now_ms);
  }
  ExpelLate(now_ms);
  if (phase_ == Phase::kForming && attempt_ != 0 && now_ms > form_late_ms_) {
    AttemptFailed("not all workers answered in time", now_ms);
  }
  ExpireAppends(now_ms);
  EndLateModelJobs(now_ms);
  TryForm(now_ms);
}

void ClusterState::Respond(RequestId request, absl::StatusOr<Answer> answer) {
  if (request != 0) Emit(Reply{request, std::move(answer)});
}

void ClusterState::Write(Change change, uint64_t subject) {
  const uint64_t id = next_write_++;
  writes_.emplace(id, PendingWrite{change, subject});
  Emit(Persist{id, std::move(change)});
}

}  // namespace eduba
