#ifndef EDUBA_WORKER_MODEL_SESSIONS_H_
#define EDUBA_WORKER_MODEL_SESSIONS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/page_store.h"
#include "collective/communicator.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "model/job_loop.h"
#include "model/model_content.h"
#include "storage/frame_log.h"
#include "worker/served_model.h"
#include "worker/stored_tokens.h"

namespace eduba {

// What a worker's ModelContent is made of. All outlive it.
ModelEngine::Options ModelContentOptions(Backend* backend, PageStore* store, ServedModel* model);

ContextOptions ContextOptionsOf(const v1::ModelSpec& spec);

// The door of the model sessions on one rank of one group: commands become calls of a JobLoop, and its
// progress and results become messages. It lives as long as the group; what the sessions are lives in
// ModelContent, as long as the worker. Each call is made by all ranks in the same order. One thread.
class ModelSessions final : private JobListener {
 public:
  // Takes a message, which is to be sent when `unsynced` has been synced. Null: at once.
  using SendMessage =
      std::function<void(const v1::WorkerMessage& message, const std::shared_ptr<FrameLog>& unsynced)>;
  struct Options {
    ModelContent* content = nullptr;  // All outlive the object.
    StoredTokens* tokens = nullptr;   // Null: ids are not kept on the disk.
    const ServedModel* model = nullptr;
    Communicator* group = nullptr;
    uint64_t epoch = 0;
    std::string node;  // This worker's, as placements name it.
    // Progress and results of jobs.
    SendMessage send;
  };

  explicit ModelSessions(Options options);

  // Drops the sessions that are not named.
  void Retain(const v1::RetainSessions& request);
  // Makes an empty session, or finds the one that is held; says what is held now.
  //   FAILED_PRECONDITION  the session was made for another model
  //   INVALID_ARGUMENT     the placement does not name this worker; or as ModelEngine::Open
  absl::StatusOr<v1::SessionContent> Open(const v1::OpenSession& request);
  bool Holds(uint64_t session_id) const { return options_.content->Holds(session_id); }
  // Its jobs end with NOT_FOUND. Unknown sessions are ignored.
  void Close(uint64_t session_id) { jobs_.Close(session_id); }
  absl::Status Fork(const v1::ForkSession& request) {
    return jobs_.Fork(request.session_id(), request.fork_id());
  }

  // Whether the command is one that Start takes: a model command, or SettleSession of a session that is held
  // here.
  bool IsJob(const v1::Command& command) const;
  // Makes the command a job, whose result is sent when it has ended (which may be within this call); after an
  // error there is no job, and the result is the caller's to send. Errors are JobLoop::Start's. REQUIRES:
  // IsJob.
  absl::Status Start(const v1::Command& command);
  // These four: JobLoop's.
  void Cancel(uint64_t ordinal) { jobs_.Cancel(ordinal); }
  void FailAll(const absl::Status& status) { jobs_.FailAll(status); }
  bool busy() const { return jobs_.busy(); }
  absl::StatusOr<uint64_t> Step(uint64_t newest) { return jobs_.Step(newest); }

 private:
  // Starts a job after which ids may have to be synced.
  absl::Status StartExtending(const JobId& id, JobRequest request);
  void OnProgress(uint64_t job, const JobProgress& progress) override;
  void OnResult(uint64_t job, const JobResult& result) override;
  void SendVectors(uint64_t job, absl::Span<const float> vectors);
  void SendProgress(uint64_t job, v1::ModelProgress progress);

  const Options options_;
  std::map<uint64_t, uint64_t> extended_;  // Job -> the session that it makes longer, or settles.
  JobLoop jobs_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_MODEL_SESSIONS_H_
