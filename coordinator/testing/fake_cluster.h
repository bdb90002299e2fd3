#ifndef EDUBA_COORDINATOR_TESTING_FAKE_CLUSTER_H_
#define EDUBA_COORDINATOR_TESTING_FAKE_CLUSTER_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/state.h"
#include "coordinator/testing/fake_rank.h"
#include "rpc/limits.h"

namespace eduba {

// A ClusterState with workers, a disk, clients and a clock, all in one thread: nothing happens unless the
// test lets it. Whatever breaks an invariant becomes a complaint.
class FakeCluster {
 public:
  struct Worker {
    bool connected = true;
    v1::WorkerHello hello;
    std::shared_ptr<FakeNode> node = std::make_shared<FakeNode>();  // What its process keeps.
    std::deque<std::shared_ptr<const v1::GroupMessage>> inbox;
    std::unique_ptr<FakeRank> rank;  // of the epoch below
    uint64_t epoch = 0;
    int formation_failures = 0;  // it will answer the next so many FormGroup with an error
    bool mute = false;           // it reads nothing
    absl::Status closed;
  };
  struct Request {
    std::optional<absl::StatusOr<Answer>> reply;
    bool cancelled = false;
    bool started = false;
    std::vector<v1::AttendResponse::Rows> rows;
    std::string generated;  // ids, int32
    std::vector<v1::EmbedResponse> embedded;
  };

  explicit FakeCluster(const ClusterState::Options& options, StoredState stored = NewState())
      : options_(options),
        stored_(std::move(stored)),
        state_(std::make_unique<ClusterState>(options, stored_)) {}

  // What a store holds that was made just now.
  static StoredState NewState() {
    StoredState state;
    state.cluster = 77;
    return state;
  }

  ClusterState& state() { return *state_; }
  int64_t now() const { return now_; }
  const StoredState& stored() const { return stored_; }
  std::vector<std::string> complaints() const {
    std::vector<std::string> all = complaints_;
    for (const auto& [id, worker] : workers) {
      if (worker.rank == nullptr) continue;
      all.insert(all.end(), worker.rank->complaints.begin(), worker.rank->complaints.end());
    }
    return all;
  }

  // A new coordinator on the same disk; all workers' streams are gone. Writes that were under way have not
  // happened.
  void Restart() {
    state_ = std::make_unique<ClusterState>(options_, stored_);
    for (auto& [id, worker] : workers) {
      worker.connected = false;
      worker.inbox.clear();
    }
    requests.clear();
    pending_persists_.clear();
    serving = false;
  }

  // A new process of a node, which is named as its address unless it has a name.
  WorkerId Join(const std::string& address, uint64_t fingerprint = 7, const std::string& incarnation = "",
                const v1::Model* model = nullptr, const std::string& node = "") {
    v1::WorkerHello hello;
    hello.set_protocol(kGroupProtocol);
    hello.set_transport(options_.transport);
    hello.set_address(address);
    hello.set_node(node.empty() ? address : node);
    hello.set_incarnation(incarnation.empty() ? absl::StrCat("i", next_id_) : incarnation);
    hello.set_fingerprint(fingerprint);
    if (model != nullptr) *hello.mutable_model() = *model;
    return Connect(hello, std::make_shared<FakeNode>());
  }
  // The process of an earlier connection, which need not be seen to be broken, comes again with what it
  // keeps.
  WorkerId Reconnect(WorkerId old) { return Connect(workers.at(old).hello, workers.at(old).node); }
  void Leave(WorkerId id) {
    workers[id].connected = false;
    workers[id].inbox.clear();
    state_->WorkerGone(id, "its stream ended", now_);
    Collect();
  }
  // `append`: some of it has come in; 0: of none.
  void Beat(WorkerId id, uint64_t append = 0) {
    v1::WorkerMessage message;
    message.mutable_heartbeat()->set_memory_used_bytes(1);
    if (append != 0) message.mutable_heartbeat()->add_appends(append);
    state_->WorkerSaid(id, message, now_);
    Collect();
  }

  // Time passes, with heartbeats of all workers that are not mute.
  void Advance(int64_t ms) {
    for (const int64_t end = now_ + ms; now_ < end;) {
      now_ = std::min(end, now_ + 100);
      for (auto& [id, worker] : workers) {
        if (worker.connected && !worker.mute) Beat(id);
      }
      state_->Tick(now_);
      Collect();
    }
  }

  // One worker takes one message. False: it had none.
  bool Deliver(WorkerId id) {
    Worker& worker = workers.at(id);
    if (!worker.connected || worker.mute || worker.inbox.empty()) return false;
    const std::shared_ptr<const v1::GroupMessage> message = std::move(worker.inbox.front());
    worker.inbox.pop_front();
    v1::WorkerMessage answer;
    if (message->has_form()) {
      const v1::FormGroup& form = message->form();
      if (form.epoch() < worker.epoch) complaints_.push_back("an epoch came twice");
      worker.epoch = form.epoch();
      if (form.cluster() != stored_.cluster) complaints_.push_back("a group of another cluster's sessions");
      worker.node->Join(form.cluster());
      if (form.nodes(form.rank()) != worker.hello.node()) complaints_.push_back("a rank is another node's");
      worker.rank = std::make_unique<FakeRank>(form.rank(), worker.node.get());
      worker.rank->content = content;
      answer.mutable_formed()->set_epoch(form.epoch());
      answer.mutable_formed()->set_attempt(form.attempt());
      if (stored_.epoch < form.epoch()) complaints_.push_back("an epoch was told before it was written down");
      if (worker.formation_failures > 0) {
        --worker.formation_failures;
        answer.mutable_formed()->set_code(14);
        answer.mutable_formed()->set_message("cannot connect");
      }
    } else if (message->has_command()) {
      const v1::Command& command = message->command();
      if (worker.rank == nullptr || command.epoch() != worker.epoch) {
        complaints_.push_back("a command of another epoch");
        return true;
      }
      Compare(command);
      const std::vector<v1::WorkerMessage> said = worker.rank->Say(command);
      for (const v1::WorkerMessage& words : said) state_->WorkerSaid(id, words, now_);
      Collect();
      return true;
    } else {
      return true;  // AbortGroup
    }
    state_->WorkerSaid(id, answer, now_);
    Collect();
    return true;
  }

  // The disk finishes the oldest write. False: there is none.
  bool FinishWrite() {
    if (pending_persists_.empty()) return false;
    const Persist persist = std::move(pending_persists_.front());
    pending_persists_.pop_front();
    absl::Status status;
    if (disk_failures > 0) {
      --disk_failures;
      status = absl::ResourceExhaustedError("disk full");
    } else {
      Apply(persist.change);
    }
    state_->Persisted(persist.id, status, now_);
    Collect();
    return true;
  }

  // The disk finishes the oldest write, and nobody hears of it any more. False: there is none.
  bool FinishWriteUnheard() {
    if (pending_persists_.empty()) return false;
    Apply(pending_persists_.front().change);
    pending_persists_.pop_front();
    return true;
  }

  // Until nothing is left to do at this time.
  void Settle() {
    for (bool busy = true; busy;) {
      busy = FinishWrite();
      std::vector<WorkerId> ids;
      for (const auto& [id, worker] : workers) ids.push_back(id);
      for (const WorkerId id : ids) {
        while (Deliver(id)) busy = true;
      }
    }
  }

  // Begins a request; `event` hands it to the state.
  template <typename Event>
  RequestId Ask(const Event& event) {
    const RequestId id = next_id_++;
    requests[id];
    event(*state_, id);
    Collect();
    return id;
  }
  template <typename Event>
  absl::StatusOr<Answer> Get(const Event& event) {
    const RequestId id = Ask(event);
    Settle();
    if (!requests[id].reply.has_value()) return absl::DeadlineExceededError("no reply");
    return *requests[id].reply;
  }
  void Cancel(RequestId id) {
    requests[id].cancelled = true;
    state_->Cancel(id, now_);
    Collect();
  }

  // Takes the effects out. Called after every event.
  void Collect() {
    for (Effect& effect : state_->TakeEffects()) {
      if (auto* send = std::get_if<SendToWorker>(&effect)) {
        const v1::FormGroup& form = send->message->form();
        if (send->message->has_form() && std::make_pair(form.epoch(), form.attempt()) != rendezvous) {
          complaints_.push_back("workers were told to meet in a rendezvous store that is not theirs");
        }
        const auto it = workers.find(send->worker);
        if (it != workers.end() && it->second.connected) it->second.inbox.push_back(std::move(send->message));
      } else if (auto* close = std::get_if<CloseWorker>(&effect)) {
        workers[close->worker].connected = false;
        workers[close->worker].closed = close->status;
      } else if (auto* reply = std::get_if<Reply>(&effect)) {
        Request& request = requests.at(reply->request);
        if (request.reply.has_value()) complaints_.push_back("a request was answered twice");
        if (request.cancelled) complaints_.push_back("a cancelled request was answered");
        request.reply = std::move(reply->answer);
      } else if (auto* started = std::get_if<AttendStarted>(&effect)) {
        requests.at(started->request).started = true;
      } else if (auto* rows = std::get_if<AttendedRows>(&effect)) {
        Request& request = requests.at(rows->request);
        if (request.reply.has_value() || request.cancelled) complaints_.push_back("rows after the end");
        request.rows.push_back(std::move(rows->rows));
      } else if (auto* generated = std::get_if<Generated>(&effect)) {
        Request& request = requests.at(generated->request);
        if (request.reply.has_value() || request.cancelled) complaints_.push_back("tokens after the end");
        request.generated += generated->tokens.ids();
      } else if (auto* embedded = std::get_if<Embedded>(&effect)) {
        requests.at(embedded->request).embedded.push_back(std::move(embedded->rows));
      } else if (auto* persist = std::get_if<Persist>(&effect)) {
        pending_persists_.push_back(std::move(*persist));
      } else if (auto* reset = std::get_if<ResetRendezvous>(&effect)) {
        rendezvous = {reset->epoch, reset->attempt};
      } else if (auto* set = std::get_if<SetServing>(&effect)) {
        if (serving == set->serving) complaints_.push_back("health changed to what it was");
        serving = set->serving;
      } else {
        notes.push_back(std::get<Note>(effect).text);
      }
    }
  }

  std::map<WorkerId, Worker> workers;
  std::map<RequestId, Request> requests;
  std::vector<std::string> notes;
  std::pair<uint64_t, uint32_t> rendezvous{0, 0};
  bool serving = false;
  int disk_failures = 0;
  uint64_t content = 1;  // of new groups' ranks

 private:
  void Apply(const Change& change) {
    if (const auto* epoch = std::get_if<EpochBegun>(&change)) {
      if (epoch->epoch <= stored_.epoch) complaints_.push_back("an epoch was used again");
      stored_.epoch = epoch->epoch;
    } else if (const auto* created = std::get_if<SessionCreated>(&change)) {
      if (created->session.id < stored_.next_session_id) complaints_.push_back("a session id was used again");
      stored_.next_session_id = created->session.id + 1;
      stored_.sessions.push_back(created->session);
    } else if (const auto* erased = std::get_if<SessionErased>(&change)) {
      if (std::erase_if(stored_.sessions, [&](const auto& s) { return s.id == erased->session_id; }) != 1) {
        complaints_.push_back("a session that is not there was erased");
      }
    } else if (const auto* placed = std::get_if<SessionPlaced>(&change)) {
      for (SessionRecord& session : stored_.sessions) {
        if (session.id != placed->session_id) continue;
        if (session.length() > 0) complaints_.push_back("a session with content was placed anew");
        if (placed->placement.version <= session.placement.version)
          complaints_.push_back("a placement came twice");
        session.placement = placed->placement;
      }
    } else {
      const auto& committed = std::get<AppendCommitted>(change);
      for (SessionRecord& session : stored_.sessions) {
        if (session.id != committed.session_id) continue;
        if (committed.append.at != session.length()) complaints_.push_back("the appends leave a gap");
        session.appends.push_back(committed.append);
        return;
      }
      complaints_.push_back("an append to a session that is not there");
    }
  }

  WorkerId Connect(const v1::WorkerHello& hello, std::shared_ptr<FakeNode> node) {
    const WorkerId id = next_id_++;
    workers[id].hello = hello;
    workers[id].node = std::move(node);
    state_->WorkerConnected(id, now_);
    v1::WorkerMessage message;
    *message.mutable_hello() = hello;
    state_->WorkerSaid(id, message, now_);
    Collect();
    return id;
  }

  // Every rank must see the same commands.
  void Compare(v1::Command command) {
    if (command.has_begin_append()) command.mutable_begin_append()->clear_owned();
    const auto key = std::make_pair(command.epoch(), command.ordinal());
    const auto [it, inserted] = commands_.emplace(key, command.SerializeAsString());
    if (!inserted && it->second != command.SerializeAsString()) {
      complaints_.push_back("ranks got different commands");
    }
  }

  const ClusterState::Options options_;
  StoredState stored_;
  std::unique_ptr<ClusterState> state_;
  int64_t now_ = 1000;
  uint64_t next_id_ = 1;
  std::deque<Persist> pending_persists_;
  std::map<std::pair<uint64_t, uint64_t>, std::string> commands_;
  std::vector<std::string> complaints_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_TESTING_FAKE_CLUSTER_H_
