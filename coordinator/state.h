#ifndef EDUBA_COORDINATOR_STATE_H_
#define EDUBA_COORDINATOR_STATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/appends.h"
#include "coordinator/effects.h"
#include "coordinator/group.h"
#include "coordinator/jobs.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "coordinator/queries.h"
#include "coordinator/records.h"
#include "coordinator/reopening.h"
#include "coordinator/sessions.h"

namespace eduba {

// All that the coordinator decides, in one object: the state machines of group.h, sessions.h, reopening.h,
// appends.h, queries.h and jobs.h, wired to each other. Pure: no I/O, no clock, no threads. Events come in as
// calls that carry the time; what is to be done about them is taken out with TakeEffects. The same events
// give the same effects, so a whole cluster can be run from a seed.
//
// Times are milliseconds of any clock that never goes back.
//
// Invariants: the epoch is written down before any worker hears of it and is never used again; within an
// epoch every worker of the group gets the same commands with ordinals 1, 2, 3, ...; the appends of a session
// tile [0, length); every request is answered exactly once or was cancelled.
class ClusterState final : private Group::Listener {
 public:
  using Options = Group::Options;

  // `stored`: what an earlier coordinator wrote down.
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

  // ---- The rest. Persisted: in the order of the Persist effects.
  void Persisted(uint64_t id, const absl::Status& status, int64_t now_ms);
  // At least every 200 ms.
  void Tick(int64_t now_ms);

  std::vector<Effect> TakeEffects() { return outbox_.Take(); }

 private:
  void OnActive(int64_t now_ms) override;
  void OnOver(const std::string& why, int64_t now_ms) override;
  void OnHeartbeat(const v1::WorkerHeartbeat& heartbeat, int64_t now_ms) override;
  void OnProgress(int rank, v1::ModelProgress progress, int64_t now_ms) override;

  Outbox outbox_;
  Journal journal_;
  Group group_;
  Sessions sessions_;
  Reopening reopening_;
  Appends appends_;
  Queries queries_;
  Jobs jobs_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_STATE_H_
