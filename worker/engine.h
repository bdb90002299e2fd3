#ifndef EDUBA_WORKER_ENGINE_H_
#define EDUBA_WORKER_ENGINE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attention/page_store.h"
#include "attention/sequence.h"
#include "attention/staged_append.h"
#include "collective/communicator.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "worker/model_sessions.h"
#include "worker/served_model.h"

namespace eduba {

// What a worker does with the coordinator's messages. Commands run one after another, in the order of their
// ordinals, on one thread, so that collectives meet in the same order on every rank. Model commands become
// jobs, whose steps run on the same thread; while there are any, other commands run between two steps, which
// all ranks agree on (docs/adr/0008). Everything belongs to one epoch and goes with it. One Engine serves one
// connection to the coordinator.
class Engine {
 public:
  struct Options {
    Backend* backend = nullptr;  // Outlives the engine, as the store does.
    PageStore* store = nullptr;
    ServedModel* model = nullptr;  // Null: none, and model sessions are refused.
    // Joins the ranks of a group; blocks until all have come, or `deadline`.
    std::function<absl::StatusOr<std::unique_ptr<Communicator>>(const v1::FormGroup& form,
                                                                absl::Time deadline)>
        connect;
    // Answers to the coordinator. Called from the engine's thread.
    std::function<void(const v1::WorkerMessage& message)> send;
    // Whether the worker is in a group that works. Must return at once and not call the engine.
    std::function<void(bool active)> on_active;
  };

  explicit Engine(Options options);
  // Stops.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues a message; returns at once. A new or ended group takes effect on a running command at once: its
  // collective returns, its kernels stop between two pages.
  void Handle(v1::GroupMessage message);

  // Takes rows into a staged append, from any thread. NOT_FOUND when no append has this id; otherwise as
  // StagedAppend::AddRows.
  absl::Status Upload(const v1::UploadRequest& request);

  // The appends into which rows have come since the last call. Any thread.
  std::vector<uint64_t> TakeTouchedAppends();

  // Ends the group and the command under way, and gives all memory back. Idempotent.
  void Stop();

 private:
  // A FormGroup and what became of it.
  struct Formation {
    v1::FormGroup form;
    std::atomic<bool> cancelled = false;  // Set with `over`.
    // Guarded by mutex_:
    std::shared_ptr<Communicator> communicator;  // Once connected.
    absl::Status over;                           // Not OK: the group ended, and why.
  };
  struct Task {
    v1::GroupMessage message;
    absl::Time received;
    std::shared_ptr<Formation> formation;  // Of a FormGroup.
  };

  void Run();
  void RunTask(const Task& task);
  // Whether the next thing to do is a step of the jobs, not a message. REQUIRES: mutex_ held, as the next
  // one.
  bool StepIsDue() const;
  // The ordinal of the newest command of this epoch that has come.
  uint64_t NewestOrdinal() const;
  void StepJobs();
  void End(Formation& formation, const absl::Status& reason);  // REQUIRES: mutex_ held.
  // The rest: on the engine's thread.
  void Form(const Task& task);
  void DropAll();
  // Nothing: the command is a job now, which sends its result when it has ended.
  std::optional<v1::CommandResult> Execute(const v1::Command& command);
  absl::Status CheckTurn(const v1::Command& command);
  absl::Status Dispatch(const v1::Command& command, absl::Time deadline, v1::CommandResult& result);
  absl::StatusOr<ModelSessions*> Models();
  absl::Status OpenSession(const v1::OpenSession& request);
  absl::Status CloseSession(const v1::CloseSession& request);
  absl::Status BeginAppend(const v1::BeginAppend& request);
  absl::Status SealAppend(const v1::SealAppend& request, v1::SealResult& result);
  absl::Status CommitAppend(const v1::CommitAppend& request);
  absl::Status AbortAppend(const v1::AbortAppend& request);
  absl::Status Attend(const v1::AttendStep& request, absl::Time deadline, v1::AttendResult& result);
  void DropAppend(uint64_t append_id);
  absl::StatusOr<std::shared_ptr<StagedAppend>> FindAppend(uint64_t append_id) const;

  const Options options_;
  std::shared_ptr<Formation> current_;  // The engine's thread only, as those up to mutex_.
  uint64_t next_ordinal_ = 1;
  std::map<uint64_t, std::unique_ptr<Sequence>> sessions_;
  std::unique_ptr<ModelContent> model_content_;  // Null without a model, as the next one.
  std::unique_ptr<ModelSessions> models_;        // Of the epoch.
  uint64_t admitted_ = 0;  // While there are jobs: commands up to this ordinal run before the next step.

  mutable std::mutex mutex_;  // Guards all below but the thread.
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::shared_ptr<Formation> latest_;
  std::map<uint64_t, std::shared_ptr<StagedAppend>> appends_;
  std::set<uint64_t> touched_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_ENGINE_H_
