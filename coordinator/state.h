#ifndef EDUBA_COORDINATOR_STATE_H_
#define EDUBA_COORDINATOR_STATE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/id_log.h"
#include "coordinator/batcher.h"
#include "coordinator/effects.h"
#include "coordinator/records.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// All that the coordinator decides: who is in the group, which sessions there are, what is stored where,
// which rows are asked together. A pure state machine: no I/O, no clock, no threads. Events come in as calls
// that carry the time; what is to be done about them is taken out with TakeEffects. The same events give the
// same effects, so a whole cluster can be run from a seed.
//
// Times are milliseconds of any clock that never goes back.
//
// Invariants: the epoch is written down before any worker hears of it and is never used again; within an
// epoch every worker of the group gets the same commands with ordinals 1, 2, 3, ...; the appends of a session
// tile [0, length); every request is answered exactly once or was cancelled.
class ClusterState {
 public:
  struct Options {
    int group_size = 1;               // 1 to kMaxGroupSize
    std::string transport = "local";  // of the collectives; workers must use the same
    std::string version;              // of the program, for ListWorkers
    // For all ranks of a group to find each other.
    int64_t form_timeout_ms = 10000;
    // For one command, from when a worker begins it; steps get more, by their work. Not the caller's
    // deadline: that one must not break the group.
    int64_t operation_timeout_ms = 30000;
  };

  // `stored`: what an earlier coordinator wrote down. Content lived in its workers' memory, so sessions that
  // have any come up lost.
  ClusterState(Options options, StoredState stored);
  ClusterState(const ClusterState&) = delete;
  ClusterState& operator=(const ClusterState&) = delete;

  // ---- Workers. A worker that was closed is forgotten: later events of it are ignored.
  void WorkerConnected(WorkerId worker, int64_t now_ms);
  void WorkerSaid(WorkerId worker, v1::WorkerMessage message, int64_t now_ms);
  // The stream broke; `why` completes "worker ... left: ".
  void WorkerGone(WorkerId worker, const std::string& why, int64_t now_ms);

  // ---- Clients. Each starts a request that ends with one Reply.
  void CreateSession(RequestId request, const v1::CreateSessionRequest& args, int64_t unix_ms,
                     int64_t now_ms);                                         // Session
  void GetSession(RequestId request, const v1::GetSessionRequest& args);      // Session
  void ListSessions(RequestId request, const v1::ListSessionsRequest& args);  // ListSessionsResponse
  void DeleteSession(RequestId request, const v1::DeleteSessionRequest& args, int64_t now_ms);  // Done
  void PlanAppend(RequestId request, const v1::PlanAppendRequest& args, int64_t now_ms);        // AppendPlan
  void CommitAppend(RequestId request, uint64_t append_id, int64_t now_ms);  // AppendReceipt
  void AbortAppend(RequestId request, uint64_t append_id, int64_t now_ms);   // Done
  void ListWorkers(RequestId request);                                       // ListWorkersResponse

  // AttendStarted follows (or an error's Reply), then AttendedRows for what SubmitRows brings, then
  // AttendTotals after FinishRows.
  void StartAttend(RequestId request, const v1::AttendRequest::Header& header, int64_t now_ms);
  // Values must be finite (the caller looks). A call that has ended already is ignored.
  void SubmitRows(RequestId request, std::string queries, std::vector<int64_t> positions, int64_t now_ms);
  void FinishRows(RequestId request, int64_t now_ms);

  // ---- Clients of model sessions.
  void GetModel(RequestId request);  // Model
  // One message of an append. `at`: as AppendTokensRequest's.
  void AppendTokens(RequestId request, const std::string& session, std::optional<int64_t> at,
                    std::vector<int32_t> ids, int64_t now_ms);  // AppendTokensReceipt
  void Generate(RequestId request, const v1::GenerateRequest& args,
                int64_t now_ms);                                                // Generated; GenerateSummary
  void Score(RequestId request, const v1::ScoreRequest& args, int64_t now_ms);  // ScoreResponse
  void Embed(RequestId request, const v1::EmbedRequest& args, int64_t now_ms);  // Embedded; Done
  void ForkSession(RequestId request, const v1::ForkSessionRequest& args, int64_t unix_ms,
                   int64_t now_ms);  // Session

  // Nobody waits for the request any more: no Reply. Queued rows are dropped, a plan is undone, a model's job
  // ends with what it has; a commit that is under way goes on (asking again gives its receipt).
  void Cancel(RequestId request, int64_t now_ms);

  // ---- The rest.
  void Persisted(uint64_t id, const absl::Status& status, int64_t now_ms);
  // At least every 200 ms.
  void Tick(int64_t now_ms);

  std::vector<Effect> TakeEffects() { return std::exchange(effects_, {}); }

 private:
  enum class Phase { kWaiting, kRecording, kForming, kActive };

  struct WorkerEntry {
    WorkerId id = 0;
    bool greeted = false;
    v1::WorkerHello hello;
    int64_t heard_ms = 0;
    int64_t memory_used_bytes = 0;
    int rank = -1;        // in the group of this epoch
    bool formed = false;  // has answered this attempt
  };

  enum class SessionPhase {
    kOpening,    // workers are being told; not written down yet
    kRecording,  // being written down
    kReady,
    kErasing,  // being struck out
    kClosing,  // struck out; workers are being told
  };

  struct SessionEntry {
    SessionRecord record;
    std::shared_ptr<const v1::SessionSpec> spec;  // record.spec, shared with calls
    SessionPhase phase = SessionPhase::kReady;
    std::string lost;         // why its content is gone; empty: it is not
    uint64_t open_epoch = 0;  // the epoch whose workers know the session
    uint64_t append_id = 0;   // the append under way, 0: none
    // The command that is extending a model session, or whose tokens are being written down; 0: none.
    uint64_t model_job = 0;
    IdLog ids;             // Of a model session, in this coordinator's life: [0, length).
    int64_t recorded = 0;  // positions of a model session that are written down
    RequestId waiter = 0;  // of the creation or deletion
    // While being opened or closed.
    bool failed = false;
    absl::Status failure;
  };

  enum class AppendPhase { kBeginning, kOpen, kSealing, kRecording, kPublishing };

  struct AppendEntry {
    uint64_t id = 0;
    uint64_t session_id = 0;
    v1::AppendPlan plan;
    AppendPhase phase = AppendPhase::kBeginning;
    int64_t expires_ms = 0;          // later with every piece that comes in
    std::vector<RequestId> waiters;  // of the plan, then of the commit
    Digest digest;                   // after the seal: over all workers
    std::string exponents;           // after the seal: the maximum over all workers
  };

  struct Call {
    uint64_t session_id = 0;
    std::shared_ptr<const v1::SessionSpec> spec;
    bool positions = false;
    bool finished = false;  // no more rows will come
    int64_t submitted = 0;
    int64_t answered = 0;
    int again = 0;  // parts that are asked again by themselves: later rows must wait for them
    AttendTotals totals;
  };

  // A model command that the workers have.
  struct ModelJob {
    enum class Kind { kAppend, kGenerate, kScore, kEmbed };
    Kind kind = Kind::kAppend;
    RequestId request = 0;  // 0: nobody waits any more
    uint64_t session_id = 0;
    std::optional<int> home;     // kGenerate: the rank that computes it; none: all do
    std::vector<int32_t> ids;    // kAppend: what was sent; kGenerate: what has come
    int64_t at = 0;              // kAppend: where the client's tokens start
    int64_t already_stored = 0;  // kAppend: of them, were there before
    int64_t sinks = 0;           // kAppend: of `ids`, the session's own sink tokens, which come first
    bool sink_mass = false;      // kGenerate, kScore: wanted
    int64_t ranges = 0;          // kEmbed: that were asked for
    int64_t embedded = 0;        // kEmbed: that have come
    int64_t started_ms = 0;
    int64_t deadline_ms = 0;  // 0: none
    bool cancelled = false;

    // The rank that says what comes of it.
    int teller() const { return home.value_or(0); }
  };

  enum class CommandKind {
    kOpenSession,
    kCloseSession,
    kBeginAppend,
    kSealAppend,
    kCommitAppend,
    kAbortAppend,
    kAttend,
    kModelJob,
    kCancelJob
  };

  struct PendingCommand {
    CommandKind kind = CommandKind::kAttend;
    uint64_t subject = 0;  // session or append id; kModelJob: the ordinal
    int64_t sent_ms = 0;
    std::vector<std::optional<v1::CommandResult>> results;  // by rank
    int missing = 0;
    Batch batch;                                                // kAttend: queries are in `message`
    int64_t work = 0;                                           // kAttend: multiply-adds of the busiest rank
    std::shared_ptr<const v1::GroupMessage> message = nullptr;  // kAttend
  };

  // state_group.cc: membership, epochs, the command stream.
  WorkerEntry* FindWorker(WorkerId worker);
  std::string NameOf(const WorkerEntry& worker) const;
  int Greeted() const;
  void Greet(WorkerEntry* worker, v1::WorkerHello hello, int64_t now_ms);
  void Refuse(WorkerId worker, absl::Status status);
  void RemoveWorker(WorkerId worker, const std::string& why, int64_t now_ms);
  // Ends the worker's stream with INTERNAL, and its epoch: it said something that the protocol does not
  // allow.
  void Expel(WorkerId worker, const std::string& why, int64_t now_ms);
  void TryForm(int64_t now_ms);
  void StartAttempt(int64_t now_ms);
  void AttemptFailed(const std::string& why, int64_t now_ms);
  void OnFormed(WorkerEntry* worker, const v1::GroupFormed& formed, int64_t now_ms);
  void Activate(int64_t now_ms);
  void EndEpoch(const std::string& why, int64_t now_ms);
  absl::Status CheckActive() const;
  std::vector<WorkerEntry*> Ranks();
  // Sends a command to all ranks. It is the same for all, but for what `share` changes.
  void Command(PendingCommand pending, v1::Command command, int64_t now_ms,
               const std::function<void(int rank, v1::Command* own)>& share = nullptr);
  int64_t TimeoutMs(const PendingCommand& command) const;
  void ExpelLate(int64_t now_ms);
  void OnResult(WorkerEntry* worker, v1::CommandResult result, int64_t now_ms);
  void Completed(const PendingCommand& command, int64_t now_ms);
  // The first failed rank's answer with that rank's name, OK when all are.
  absl::Status FirstFailure(const PendingCommand& command);

  // state_sessions.cc
  absl::StatusOr<SessionEntry*> FindSession(const std::string& name);
  absl::Status CheckNewName(const std::string& name) const;
  SessionEntry* SessionById(uint64_t id);
  // Also checks that its content is there and the group is active.
  absl::StatusOr<SessionEntry*> FindUsable(const std::string& name);
  absl::StatusOr<SessionEntry*> FindTensorSession(const std::string& name);
  SessionEntry* AddSession(RequestId waiter, const std::string& name, v1::SessionSpec spec, int64_t unix_ms);
  v1::Session Describe(const SessionEntry& session) const;
  void OpenOnWorkers(SessionEntry* session, int64_t now_ms);
  void CloseOnWorkers(SessionEntry* session, int64_t now_ms);
  void OnOpened(const PendingCommand& command, int64_t now_ms);
  void OnClosed(uint64_t session_id);
  void OnSessionRecorded(uint64_t session_id, const absl::Status& status, int64_t now_ms);
  void OnSessionErased(uint64_t session_id, const absl::Status& status, int64_t now_ms);
  void Forget(uint64_t session_id);
  void SessionsLoseTheirEpoch(const std::string& why);

  // state_appends.cc
  absl::StatusOr<v1::AppendPlan> MakePlan(const SessionEntry& session,
                                          const v1::PlanAppendRequest& args) const;
  void OnBegun(const PendingCommand& command, int64_t now_ms);
  void OnSealed(const PendingCommand& command, int64_t now_ms);
  void OnAppendRecorded(const AppendCommitted& change, uint64_t append_id, const absl::Status& status,
                        int64_t now_ms);
  void OnPublished(const PendingCommand& command, int64_t now_ms);
  void FinishComparison(AppendEntry* append, int64_t now_ms);
  void ReplyReceipt(AppendEntry* append, SessionEntry* session);
  // Tells the workers, answers whoever waits, forgets it.
  void Undo(uint64_t append_id, const absl::Status& status, int64_t now_ms);
  void ForgetAppend(uint64_t append_id);
  absl::Status NoSuchAppend(uint64_t append_id) const;
  void KeepAppend(uint64_t append_id, int64_t now_ms);
  void ExpireAppends(int64_t now_ms);

  // state_attend.cc
  int64_t VisiblePages(const v1::SessionSpec& spec, const BatchKey& key) const;
  int64_t RowWork(const v1::SessionSpec& spec, const BatchKey& key) const;
  int StepRows(const v1::SessionSpec& spec, const BatchKey& key) const;
  void PumpSteps(int64_t now_ms);
  void OnStep(const PendingCommand& command, int64_t now_ms);
  // `first`: the part's first row in the step.
  void AskAgain(const PendingCommand& command, const Batch::Part& part, int64_t first);
  void DeliverPart(Call* call, const Batch::Part& part, RequestId id, int64_t first_in_step,
                   const v1::AttendResult& result, const AttendTotals& step);
  void FailCall(RequestId request, const absl::Status& status);
  void FailCallsOf(uint64_t session_id, const absl::Status& status);
  void EndCallIfDone(RequestId request, Call* call);

  // state_models.cc
  // What the workers hold; null: none of them has a model.
  const v1::Model* CurrentModel() const;
  absl::StatusOr<SessionEntry*> FindModelSession(const std::string& name);
  absl::StatusOr<SessionEntry*> FindExtensible(const std::string& name);
  // Whether there is something to go on behind, the session's own sinks included.
  static absl::Status CheckNotEmpty(const SessionEntry& session, const std::string& what);
  absl::Status CheckSinkMass(bool wanted, const std::string& what) const;
  // The rank that is home to the fewest generations.
  int IdlestHome() const;
  uint64_t StartModelJob(ModelJob job, v1::Command command, int64_t now_ms);
  void OnModelProgress(WorkerEntry* worker, v1::ModelProgress progress, int64_t now_ms);
  void OnModelJob(const PendingCommand& command, int64_t now_ms);
  void OnTokensRecorded(uint64_t session_id, const absl::Status& status, int64_t now_ms);
  void ReplyToJob(const ModelJob& job, const SessionEntry& session, const v1::CommandResult& result,
                  int64_t now_ms);
  void CancelModelJob(uint64_t ordinal, int64_t now_ms);
  void EndLateModelJobs(int64_t now_ms);
  void CancelModelJobsOf(uint64_t session_id, int64_t now_ms);
  void FailModelJobsOf(uint64_t session_id, const absl::Status& status);

  void Emit(Effect effect) { effects_.push_back(std::move(effect)); }
  void Respond(RequestId request, absl::StatusOr<Answer> answer);
  void Write(Change change, uint64_t subject);

  const Options options_;
  std::vector<Effect> effects_;

  std::map<WorkerId, WorkerEntry> workers_;  // in order of arrival
  Phase phase_ = Phase::kWaiting;
  uint64_t epoch_ = 0;
  uint32_t attempt_ = 0;  // 0: none yet in this epoch, or the last one failed
  uint32_t next_attempt_ = 1;
  int64_t form_at_ms_ = 0;  // not before
  int64_t form_late_ms_ = 0;
  uint64_t next_ordinal_ = 1;
  std::map<uint64_t, PendingCommand> commands_;  // by ordinal, unanswered
  int64_t answered_ms_ = 0;                      // when the last one was

  std::map<std::string, SessionEntry> sessions_;
  std::unordered_map<uint64_t, std::string> session_names_;
  uint64_t next_session_id_ = 1;

  std::map<uint64_t, AppendEntry> appends_;
  uint32_t next_append_ = 1;  // within the epoch
  // Receipts for commits whose answer may have been lost, oldest first.
  std::deque<std::pair<uint64_t, v1::AppendReceipt>> receipts_;

  Batcher batcher_;
  std::deque<Batch> again_;  // go before what the batcher has
  std::map<RequestId, Call> calls_;
  int steps_in_flight_ = 0;
  std::map<uint64_t, ModelJob> model_jobs_;  // by ordinal
  // By session: jobs that have ended, whose tokens are being written down.
  std::map<uint64_t, std::pair<ModelJob, v1::CommandResult>> recording_jobs_;

  struct PendingWrite {
    Change change;
    uint64_t subject = 0;
  };
  std::map<uint64_t, PendingWrite> writes_;
  uint64_t next_write_ = 1;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_STATE_H_
