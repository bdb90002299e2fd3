#ifndef EDUBA_COORDINATOR_GROUP_H_
#define EDUBA_COORDINATOR_GROUP_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/command_stream.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// Which workers reduce together, and in which epoch. When all workers are there, an epoch is written down,
// its ranks are told to connect to each other, and commands flow; when one of them leaves, the epoch is over
// and is never used again. Ranks are the group's node ids in ascending order.
class Group {
 public:
  struct Options {
    int group_size = 1;               // 1 to kMaxGroupSize
    std::string transport = "local";  // of the collectives; workers must use the same
    std::string version;              // of the program, for ListWorkers
    bool lasting = false;             // The records outlast the process: workers keep content on their disks.
    // For all ranks of a group to find each other.
    int64_t form_timeout_ms = 10000;
    // For one command, from when a worker begins it; steps get more, by their work. Not the caller's
    // deadline: that one must not break the group.
    int64_t operation_timeout_ms = 30000;
  };
  class Listener {
   public:
    virtual ~Listener() = default;
    // Commands may be sent from now on.
    virtual void OnActive(int64_t now_ms) = 0;
    // No command is answered any more. `why` names the worker and the epoch.
    virtual void OnOver(const std::string& why, int64_t now_ms) = 0;
    virtual void OnHeartbeat(const v1::WorkerHeartbeat& heartbeat, int64_t now_ms) = 0;
    virtual void OnProgress(int rank, v1::ModelProgress progress, int64_t now_ms) = 0;
  };

  // `stored`: cluster, epoch and terms count. `listener` is not called by the constructor.
  Group(Options options, const StoredState& stored, Journal* journal, Outbox* outbox, Listener* listener);

  // ---- Events. A worker that was closed is forgotten: later events of it are ignored.
  void WorkerConnected(WorkerId worker, int64_t now_ms);
  void WorkerSaid(WorkerId worker, v1::WorkerMessage message, int64_t now_ms);
  void WorkerGone(WorkerId worker, const std::string& why, int64_t now_ms);
  void Tick(int64_t now_ms);
  v1::ListWorkersResponse List() const;

  // ---- For the other machines.
  int size() const { return options_.group_size; }
  uint64_t epoch() const { return epoch_; }
  bool active() const { return phase_ == Phase::kActive; }
  // UNAVAILABLE says what is missing.
  absl::Status CheckActive() const;
  // What the workers hold; null: none of them has a model.
  const v1::Model* model() const;
  // By rank. REQUIRES, as all below: active().
  const std::vector<std::string>& nodes() const { return nodes_; }
  std::string NameOf(int rank) const;
  std::string AddressOf(int rank) const;
  // Sends as CommandStream::Send does.
  std::shared_ptr<const v1::GroupMessage> Send(v1::Command command, int64_t now_ms,
                                               CommandStream::Done done = nullptr,
                                               const CommandStream::Share& share = nullptr,
                                               int64_t extra_ms = 0);
  // The first failed rank's answer with that rank's name; OK when all are.
  absl::Status FirstFailure(const Answered& answered) const;
  // Ends the rank's stream with INTERNAL, and the epoch: it said something that the protocol does not allow.
  void Expel(int rank, const std::string& why, int64_t now_ms);
  // Ends the epoch; all workers stay.
  void End(const std::string& why, int64_t now_ms);

 private:
  enum class Phase { kWaiting, kRecording, kForming, kActive };
  struct Worker {
    WorkerId id = 0;
    bool greeted = false;
    v1::WorkerHello hello;
    int64_t heard_ms = 0;
    int64_t memory_used_bytes = 0;
    int rank = -1;        // In the group of this epoch.
    bool formed = false;  // Has answered this attempt.
  };

  Worker* Find(WorkerId worker);
  static std::string NameOf(const Worker& worker);
  int Greeted() const;
  // By rank. REQUIRES: the epoch has ranks.
  std::vector<Worker*> Ranks();
  const Worker& AtRank(int rank) const;
  void Greet(Worker* worker, v1::WorkerHello hello, int64_t now_ms);
  void ReplaceOld(const v1::WorkerHello& hello, int64_t now_ms);
  void Refuse(WorkerId worker, absl::Status status);
  void Expel(WorkerId worker, const std::string& why, int64_t now_ms);
  void Remove(WorkerId worker, const std::string& why, int64_t now_ms);
  void TryForm(int64_t now_ms);
  void OnEpochRecorded(const absl::Status& status, int64_t now_ms);
  void StartAttempt(int64_t now_ms);
  void AttemptFailed(const std::string& why, int64_t now_ms);
  void OnFormed(Worker* worker, const v1::GroupFormed& formed, int64_t now_ms);
  void OnResult(Worker* worker, v1::CommandResult result, int64_t now_ms);
  void ExpelSilentAndLate(int64_t now_ms);

  const Options options_;
  const uint64_t cluster_;
  const std::vector<Term> terms_;  // The terms that used these records; the last is this coordinator's.
  Journal* const journal_;
  Outbox* const outbox_;
  Listener* const listener_;
  CommandStream commands_;
  std::map<WorkerId, Worker> workers_;
  Phase phase_ = Phase::kWaiting;
  uint64_t epoch_;
  std::vector<std::string> nodes_;  // By rank, of this epoch.
  uint32_t attempt_ = 0;            // 0: none yet in this epoch, or the last one failed
  uint32_t next_attempt_ = 1;
  int64_t form_at_ms_ = 0;  // Not before.
  int64_t form_late_ms_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_GROUP_H_
