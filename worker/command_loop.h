#ifndef EDUBA_WORKER_COMMAND_LOOP_H_
#define EDUBA_WORKER_COMMAND_LOOP_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "storage/syncer.h"
#include "worker/membership.h"
#include "worker/node_content.h"

namespace eduba {

// What a worker does with the messages of one connection to the coordinator. Commands run one after another,
// in the order of their ordinals, on one thread, so that collectives meet in the same order on every rank.
// Model commands become jobs, whose steps run on the same thread; while there are any, other commands run
// between two steps, at places on which all ranks agree (docs/adr/0008). A group that ends, or the end of the
// connection, ends the membership and leaves the content.
class CommandLoop {
 public:
  struct Options {
    Backend* backend = nullptr;  // Both outlive the loop. No other loop uses the content at the same time.
    NodeContent* content = nullptr;
    ConnectGroup connect;
    // Answers to the coordinator. Called from the loop's thread.
    std::function<void(const v1::WorkerMessage& message)> send;
    // Whether the worker is in a group that works. Must return at once and not call the loop.
    std::function<void(bool active)> on_active;
  };

  explicit CommandLoop(Options options);
  // Stops.
  ~CommandLoop();
  CommandLoop(const CommandLoop&) = delete;
  CommandLoop& operator=(const CommandLoop&) = delete;

  // Queues a message; returns at once. A new or ended group takes effect on a running command at once: its
  // collective returns, its kernels stop between two pages.
  void Handle(v1::GroupMessage message);

  // These two: TensorContent's, from any thread.
  absl::Status Upload(const v1::UploadRequest& request) { return tensors_.Upload(request); }
  std::vector<uint64_t> TakeTouchedAppends() { return tensors_.TakeTouchedAppends(); }

  // Ends the group and the command under way. Idempotent.
  void Stop();

 private:
  struct Task {
    v1::GroupMessage message;
    absl::Time received;
    std::shared_ptr<Membership> membership;  // The membership that a FormGroup made.
  };

  // Until Stop.
  void Run();
  // False: the loop is to end. Otherwise either results that are to be sent, or a task, or neither: a step of
  // the jobs is due.
  bool NextTask(std::shared_ptr<Task>& task, std::vector<v1::WorkerMessage>& synced);
  // Whether the next thing to do is a step of the jobs, not a message.
  bool StepIsDue() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The ordinal of the newest command of this epoch that has come.
  uint64_t NewestOrdinal() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void StepJobs();
  void RunTask(const Task& task);
  void Form(const Task& task);
  // Ends the membership; what began in it and cannot go on without it goes too.
  void LeaveGroup();

  void Execute(const v1::Command& command);
  // What came of the command, in `result`; or OK with `is_job`: the result comes when the job has ended.
  // The same with `unsynced`: when that has been synced.
  absl::Status Dispatch(const v1::Command& command, v1::CommandResult& result, bool& is_job,
                        std::shared_ptr<FrameLog>& unsynced);
  absl::Status DispatchToTensors(const v1::Command& command, v1::CommandResult& result,
                                 std::shared_ptr<FrameLog>& unsynced);
  absl::Status DispatchToModels(const v1::Command& command, bool& is_job);
  absl::Status RetainSessions(const v1::RetainSessions& request);
  absl::Status OpenSession(const v1::OpenSession& request, v1::SessionContent& content);
  absl::Status CloseSession(const v1::CloseSession& request);
  // Has the result sent when what was sealed is on the disk.
  void SendWhenSynced(std::shared_ptr<FrameLog> log, v1::WorkerMessage answer);
  // Every message passes here. Results say whether the group is over.
  void Send(v1::WorkerMessage message);

  const Options options_;
  TensorContent& tensors_;
  // The loop's thread only, as the next one.
  std::shared_ptr<Membership> membership_;  // Null: in no group.
  uint64_t admitted_ = 0;  // While there are jobs: commands up to this ordinal run before the next step.

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<Task>> tasks_ ABSL_GUARDED_BY(mutex_);
  // Results that waited for the disk, and are to be sent.
  std::vector<v1::WorkerMessage> synced_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<Membership> latest_ ABSL_GUARDED_BY(mutex_);  // Made by the newest FormGroup that has come.
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  Syncer syncer_;
  std::thread thread_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_COMMAND_LOOP_H_
