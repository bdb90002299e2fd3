#include "coordinator/group.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/pages.h"
#include "coordinator/admission.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// After an epoch ends: time for the news of a dead worker's broken stream to come in, so that the next group
// is not formed with it.
constexpr int64_t kReformDelayMs = 200;
constexpr int64_t kAttemptDelayMs = 100;  // Doubles with every failed attempt.
constexpr int64_t kAttemptDelayMaxMs = 2000;
// Workers answer within the timeout that they were given; this much later they are not going to.
constexpr int64_t kAnswerGraceMs = 2000;

}  // namespace

Group::Group(Options options, const StoredState& stored, Journal* journal, Outbox* outbox, Listener* listener)
    : options_(std::move(options)),
      cluster_(stored.cluster),
      terms_(stored.terms),
      journal_(journal),
      outbox_(outbox),
      listener_(listener),
      commands_(options_.operation_timeout_ms, outbox),
      epoch_(stored.epoch) {
  EDUBA_CHECK(options_.group_size >= 1 && options_.group_size <= kMaxGroupSize);
}

Group::Worker* Group::Find(WorkerId worker) {
  const auto it = workers_.find(worker);
  return it == workers_.end() ? nullptr : &it->second;
}

std::string Group::NameOf(const Worker& worker) {
  if (worker.rank < 0) return absl::StrCat("worker ", worker.hello.address());
  return absl::StrCat("worker ", worker.rank, " (", worker.hello.address(), ")");
}

const Group::Worker& Group::AtRank(int rank) const {
  const auto it = std::find_if(workers_.begin(), workers_.end(),
                               [rank](const auto& entry) { return entry.second.rank == rank; });
  EDUBA_CHECK(it != workers_.end());
  return it->second;
}

std::string Group::NameOf(int rank) const { return NameOf(AtRank(rank)); }

std::string Group::AddressOf(int rank) const { return AtRank(rank).hello.address(); }

int Group::Greeted() const {
  return static_cast<int>(std::count_if(workers_.begin(), workers_.end(),
                                        [](const auto& entry) { return entry.second.greeted; }));
}

std::vector<Group::Worker*> Group::Ranks() {
  std::vector<Worker*> ranks(options_.group_size, nullptr);
  for (auto& [id, worker] : workers_) {
    if (worker.rank >= 0) ranks[worker.rank] = &worker;
  }
  return ranks;
}

const v1::Model* Group::model() const {
  for (const auto& [id, worker] : workers_) {
    if (worker.greeted && worker.hello.has_model()) return &worker.hello.model();
  }
  return nullptr;
}

// ---- Workers

void Group::WorkerConnected(WorkerId id, int64_t now_ms) {
  Worker& worker = workers_[id];
  worker.id = id;
  worker.heard_ms = now_ms;
}

void Group::WorkerSaid(WorkerId id, v1::WorkerMessage message, int64_t now_ms) {
  Worker* worker = Find(id);
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
      return listener_->OnHeartbeat(message.heartbeat(), now_ms);
    case v1::WorkerMessage::kFormed:
      return OnFormed(worker, message.formed(), now_ms);
    case v1::WorkerMessage::kResult:
      return OnResult(worker, std::move(*message.mutable_result()), now_ms);
    case v1::WorkerMessage::kProgress:
      if (!active() || message.progress().epoch() != epoch_ || worker->rank < 0) return;
      commands_.StepMade(now_ms);
      return listener_->OnProgress(worker->rank, std::move(*message.mutable_progress()), now_ms);
    case v1::WorkerMessage::KIND_NOT_SET:
      return Expel(id, "sent an empty message", now_ms);
  }
}

void Group::WorkerGone(WorkerId id, const std::string& why, int64_t now_ms) { Remove(id, why, now_ms); }

void Group::Greet(Worker* worker, v1::WorkerHello hello, int64_t now_ms) {
  const WorkerId id = worker->id;
  absl::Status status = CheckHello(hello, options_.transport, options_.version, cluster_, terms_);
  if (!status.ok()) return Refuse(id, std::move(status));
  ReplaceOld(hello, now_ms);
  for (const auto& [other_id, other] : workers_) {
    if (other.greeted && status.ok()) status = CheckBeside(hello, other.hello);
  }
  if (!status.ok()) return Refuse(id, std::move(status));
  if (Greeted() >= options_.group_size) {
    return Refuse(id, absl::UnavailableError(absl::StrCat("the group has its ", options_.group_size,
                                                          " workers already: come again later")));
  }
  worker->hello = std::move(hello);
  worker->greeted = true;
  outbox_->Log(absl::StrCat(NameOf(*worker), " joined: ", worker->hello.backend(), ", ",
                            worker->hello.threads(), " threads; ", Greeted(), " of ", options_.group_size,
                            " workers"));
  TryForm(now_ms);
}

// A node that has come again before its old stream was seen to break. Another process of the node replaces
// the earlier one for good: if both live, they were given one data folder, and must not push each other out
// for ever.
void Group::ReplaceOld(const v1::WorkerHello& hello, int64_t now_ms) {
  const auto old = std::find_if(workers_.begin(), workers_.end(), [&hello](const auto& entry) {
    return entry.second.greeted && entry.second.hello.node() == hello.node();
  });
  if (old == workers_.end()) return;
  const WorkerId id = old->first;
  if (old->second.hello.incarnation() == hello.incarnation()) {
    outbox_->Emit(CloseWorker{id, absl::UnavailableError("the worker has joined anew")});
    return Remove(id, "it joined anew", now_ms);
  }
  outbox_->Emit(
      CloseWorker{id, absl::FailedPreconditionError(absl::StrCat(
                          "another process of node ", hello.node(), ", at ", hello.address(),
                          ", has joined in its place: stop one of them, or give each its own node id"))});
  Remove(id, "a later process of its node joined", now_ms);
}

void Group::Refuse(WorkerId id, absl::Status status) {
  workers_.erase(id);
  outbox_->Log(absl::StrCat("refused: ", std::string(status.message())));
  outbox_->Emit(CloseWorker{id, std::move(status)});
}

void Group::Expel(int rank, const std::string& why, int64_t now_ms) { Expel(AtRank(rank).id, why, now_ms); }

void Group::Expel(WorkerId id, const std::string& why, int64_t now_ms) {
  const Worker* worker = Find(id);
  if (worker == nullptr) return;
  outbox_->Emit(CloseWorker{id, absl::InternalError(absl::StrCat(NameOf(*worker), " ", why))});
  Remove(id, absl::StrCat("it ", why), now_ms);
}

void Group::Remove(WorkerId id, const std::string& why, int64_t now_ms) {
  const auto it = workers_.find(id);
  if (it == workers_.end()) return;
  const Worker worker = std::move(it->second);
  workers_.erase(it);
  if (!worker.greeted) return;
  const std::string text = absl::StrCat(NameOf(worker), " left: ", why);
  if (worker.rank >= 0) return End(text, now_ms);
  outbox_->Log(absl::StrCat(text, "; ", Greeted(), " of ", options_.group_size, " workers"));
}

// ---- Epochs

void Group::TryForm(int64_t now_ms) {
  if (phase_ == Phase::kForming && attempt_ == 0 && now_ms >= form_at_ms_) return StartAttempt(now_ms);
  if (phase_ != Phase::kWaiting || Greeted() < options_.group_size || now_ms < form_at_ms_) return;
  ++epoch_;
  phase_ = Phase::kRecording;
  journal_->Write(EpochBegun{epoch_},
                  [this](const absl::Status& status, int64_t now) { OnEpochRecorded(status, now); });
}

void Group::OnEpochRecorded(const absl::Status& status, int64_t now_ms) {
  EDUBA_CHECK(phase_ == Phase::kRecording);
  if (!status.ok() || Greeted() < options_.group_size) {
    if (!status.ok()) {
      outbox_->Log(absl::StrCat("cannot begin epoch ", epoch_, ": ", std::string(status.message())));
    }
    phase_ = Phase::kWaiting;
    form_at_ms_ = now_ms + kAttemptDelayMaxMs;
    return;
  }
  phase_ = Phase::kForming;
  next_attempt_ = 1;
  nodes_.clear();
  for (const auto& [id, worker] : workers_) {
    if (worker.greeted) nodes_.push_back(worker.hello.node());
  }
  std::sort(nodes_.begin(), nodes_.end());
  for (auto& [id, worker] : workers_) {
    if (!worker.greeted) continue;
    const auto node = std::lower_bound(nodes_.begin(), nodes_.end(), worker.hello.node());
    worker.rank = static_cast<int>(node - nodes_.begin());
  }
  StartAttempt(now_ms);
}

void Group::StartAttempt(int64_t now_ms) {
  attempt_ = next_attempt_;
  form_late_ms_ = now_ms + options_.form_timeout_ms + kAnswerGraceMs;
  outbox_->Emit(ResetRendezvous{epoch_, attempt_});
  for (Worker* worker : Ranks()) {
    worker->formed = false;
    auto message = std::make_shared<v1::GroupMessage>();
    v1::FormGroup* form = message->mutable_form();
    form->set_epoch(epoch_);
    form->set_attempt(attempt_);
    form->set_rank(worker->rank);
    form->set_size(options_.group_size);
    form->set_timeout_ms(options_.form_timeout_ms);
    form->set_cluster(cluster_);
    form->set_lasting(options_.lasting);
    if (!terms_.empty()) {
      form->set_term(terms_.back().number);
      form->set_term_nonce(terms_.back().nonce);
    }
    form->mutable_nodes()->Add(nodes_.begin(), nodes_.end());
    outbox_->Emit(SendToWorker{worker->id, std::move(message)});
  }
}

void Group::AttemptFailed(const std::string& why, int64_t now_ms) {
  outbox_->Log(absl::StrCat("epoch ", epoch_, ", attempt ", attempt_, " to form a group failed: ", why));
  form_at_ms_ = now_ms + std::min(kAttemptDelayMaxMs, kAttemptDelayMs << std::min<uint32_t>(attempt_, 10));
  attempt_ = 0;
  ++next_attempt_;
  outbox_->Emit(ResetRendezvous{0, 0});  // Ranks that still wait for an address stop.
}

void Group::OnFormed(Worker* worker, const v1::GroupFormed& formed, int64_t now_ms) {
  if (phase_ != Phase::kForming || formed.epoch() != epoch_ || attempt_ == 0 ||
      formed.attempt() != attempt_) {
    return;
  }
  if (formed.code() != 0) return AttemptFailed(absl::StrCat(NameOf(*worker), ": ", formed.message()), now_ms);
  worker->formed = true;
  const std::vector<Worker*> ranks = Ranks();
  if (!std::all_of(ranks.begin(), ranks.end(), [](const Worker* rank) { return rank->formed; })) return;
  phase_ = Phase::kActive;
  std::vector<WorkerId> ids;
  for (const Worker* rank : ranks) ids.push_back(rank->id);
  commands_.Begin(epoch_, std::move(ids), now_ms);
  outbox_->Log(absl::StrCat("epoch ", epoch_, " is active with ", options_.group_size, " workers"));
  listener_->OnActive(now_ms);
}

void Group::End(const std::string& why, int64_t now_ms) {
  const std::string text = absl::StrCat(why, "; epoch ", epoch_, " is over");
  for (auto& [id, worker] : workers_) {
    if (worker.rank < 0) continue;
    worker.rank = -1;
    auto message = std::make_shared<v1::GroupMessage>();
    message->mutable_abort()->set_epoch(epoch_);
    message->mutable_abort()->set_reason(why);
    outbox_->Emit(SendToWorker{id, std::move(message)});
  }
  phase_ = Phase::kWaiting;
  attempt_ = 0;
  form_at_ms_ = now_ms + kReformDelayMs;
  outbox_->Emit(ResetRendezvous{0, 0});
  commands_.End();
  listener_->OnOver(text, now_ms);
  outbox_->Log(text);
}

absl::Status Group::CheckActive() const {
  if (phase_ == Phase::kActive) return absl::OkStatus();
  const int greeted = Greeted();
  if (greeted < options_.group_size) {
    return absl::UnavailableError(absl::StrCat("the group has ", greeted, " of ", options_.group_size,
                                               " workers: start the missing ones, then retry"));
  }
  return absl::UnavailableError(
      absl::StrCat("the group of ", options_.group_size, " workers is forming: retry in a moment"));
}

void Group::Tick(int64_t now_ms) {
  ExpelSilentAndLate(now_ms);
  if (phase_ == Phase::kForming && attempt_ != 0 && now_ms > form_late_ms_) {
    AttemptFailed("not all workers answered in time", now_ms);
  }
  TryForm(now_ms);
}

void Group::ExpelSilentAndLate(int64_t now_ms) {
  std::vector<WorkerId> silent;
  for (const auto& [id, worker] : workers_) {
    // Workers of this process are there for as long as we are; silent they are only when all of us lack CPU.
    if (options_.transport == "local") break;
    if (now_ms - worker.heard_ms > kHeartbeatTimeoutMs) silent.push_back(id);
  }
  for (const WorkerId id : silent) {
    const std::string why = absl::StrCat("silent for ", kHeartbeatTimeoutMs, " ms");
    outbox_->Emit(CloseWorker{id, absl::UnavailableError(absl::StrCat("the worker was ", why))});
    Remove(id, why, now_ms);
  }
  if (!active()) return;
  const auto late = commands_.FindLate(now_ms);
  if (!late.has_value()) return;
  const std::string why = absl::StrCat("did not answer command ", late->ordinal, " in time");
  const WorkerId id = AtRank(late->rank).id;
  outbox_->Emit(CloseWorker{id, absl::UnavailableError(absl::StrCat("the worker ", why))});
  Remove(id, absl::StrCat("it ", why), now_ms);
}

// ---- Commands

std::shared_ptr<const v1::GroupMessage> Group::Send(v1::Command command, int64_t now_ms,
                                                    CommandStream::Done done,
                                                    const CommandStream::Share& share, int64_t extra_ms) {
  EDUBA_CHECK(active());
  return commands_.Send(std::move(command), now_ms, std::move(done), share, extra_ms);
}

void Group::OnResult(Worker* worker, v1::CommandResult result, int64_t now_ms) {
  // Late answers of an epoch that is over (ABORTED, mostly) are of no interest.
  if (!active() || result.epoch() != epoch_ || worker->rank < 0) return;
  if (result.ends_group()) {
    return End(absl::StrCat(NameOf(*worker), " reported: ", result.message()), now_ms);
  }
  const WorkerId id = worker->id;
  const uint64_t ordinal = result.ordinal();
  if (!commands_.Take(worker->rank, std::move(result), now_ms)) {
    Expel(id, absl::StrCat("answered command ", ordinal, ", which it was not asked"), now_ms);
  }
}

absl::Status Group::FirstFailure(const Answered& answered) const {
  for (size_t rank = 0; rank < answered.results.size(); ++rank) {
    const v1::CommandResult& result = answered.results[rank];
    if (result.code() == 0) continue;
    return absl::Status(static_cast<absl::StatusCode>(result.code()),
                        absl::StrCat(NameOf(static_cast<int>(rank)), ": ", result.message()));
  }
  return absl::OkStatus();
}

v1::ListWorkersResponse Group::List() const {
  v1::ListWorkersResponse response;
  response.set_epoch(epoch_);
  response.set_state(active() ? "active" : phase_ == Phase::kWaiting ? "waiting" : "forming");
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
    worker->set_state(active() ? "ready" : "joining");
  }
  return response;
}

}  // namespace eduba
