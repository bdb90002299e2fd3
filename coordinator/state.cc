#include "coordinator/state.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace eduba {

ClusterState::ClusterState(Options options, StoredState stored)
    : journal_(&outbox_),
      group_(std::move(options), stored, &journal_, &outbox_, this),
      sessions_(std::move(stored), &group_, &journal_, &outbox_),
      reopening_(&group_, &sessions_, &journal_, &outbox_),
      appends_(&group_, &sessions_, &journal_, &outbox_),
      queries_(&group_, &sessions_, &outbox_),
      jobs_(&group_, &sessions_, &journal_, &outbox_) {}

// ---- Workers

void ClusterState::WorkerConnected(WorkerId worker, int64_t now_ms) {
  group_.WorkerConnected(worker, now_ms);
}

void ClusterState::WorkerSaid(WorkerId worker, v1::WorkerMessage message, int64_t now_ms) {
  group_.WorkerSaid(worker, std::move(message), now_ms);
}

void ClusterState::WorkerGone(WorkerId worker, const std::string& why, int64_t now_ms) {
  group_.WorkerGone(worker, why, now_ms);
}

void ClusterState::OnActive(int64_t now_ms) {
  appends_.OnActive();
  reopening_.OnActive(now_ms);
}

void ClusterState::OnOver(const std::string& why, int64_t /*now_ms*/) {
  reopening_.OnOver();
  const absl::Status status = absl::UnavailableError(absl::StrCat(why, ": retry the whole call"));
  queries_.OnOver(status);
  jobs_.OnOver(status);
  appends_.OnOver(status);
  sessions_.OnOver(why);
}

void ClusterState::OnHeartbeat(const v1::WorkerHeartbeat& heartbeat, int64_t now_ms) {
  for (const uint64_t append : heartbeat.appends()) appends_.Keep(append, now_ms);
}

void ClusterState::OnProgress(int rank, v1::ModelProgress progress, int64_t now_ms) {
  jobs_.OnProgress(rank, std::move(progress), now_ms);
}

// ---- Clients

void ClusterState::CreateSession(RequestId request, const v1::CreateSessionRequest& args, int64_t unix_ms,
                                 int64_t now_ms) {
  sessions_.Create(request, args, unix_ms, now_ms);
}

void ClusterState::GetSession(RequestId request, const v1::GetSessionRequest& args) {
  sessions_.Get(request, args);
}

void ClusterState::ListSessions(RequestId request, const v1::ListSessionsRequest& args) {
  sessions_.List(request, args);
}

void ClusterState::DeleteSession(RequestId request, const v1::DeleteSessionRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = sessions_.Find(args.name());
  absl::Status status = found.status();
  if (status.ok()) status = appends_.Drop(**found, now_ms);
  if (!status.ok()) return outbox_.Respond(request, status);
  const uint64_t id = (*found)->record.id;
  const absl::Status deleted =
      absl::NotFoundError(absl::StrCat("session '", args.name(), "' was deleted during the call"));
  queries_.FailOf(id, deleted);
  jobs_.FailOf(id, deleted);
  sessions_.Delete(request, *found, [this, id](int64_t now) { jobs_.CancelOf(id, now); });
}

void ClusterState::PlanAppend(RequestId request, const v1::PlanAppendRequest& args, int64_t now_ms) {
  appends_.Plan(request, args, now_ms);
}

void ClusterState::CommitAppend(RequestId request, uint64_t append_id, int64_t now_ms) {
  appends_.Commit(request, append_id, now_ms);
}

void ClusterState::AbortAppend(RequestId request, uint64_t append_id, int64_t now_ms) {
  appends_.Abort(request, append_id, now_ms);
}

void ClusterState::ListWorkers(RequestId request) {
  v1::ListWorkersResponse list = group_.List();
  // To clients, a group is active when their sessions are there.
  if (group_.active() && !reopening_.serving()) list.set_state("forming");
  outbox_.Respond(request, Answer(std::move(list)));
}

void ClusterState::StartAttend(RequestId request, const v1::AttendRequest::Header& header,
                               int64_t /*now_ms*/) {
  queries_.Start(request, header);
}

void ClusterState::SubmitRows(RequestId request, std::string queries, std::vector<int64_t> positions,
                              int64_t now_ms) {
  queries_.Submit(request, std::move(queries), std::move(positions), now_ms);
}

void ClusterState::FinishRows(RequestId request, int64_t /*now_ms*/) { queries_.Finish(request); }

// ---- Clients of model sessions

void ClusterState::GetModel(RequestId request) {
  if (group_.model() != nullptr) return outbox_.Respond(request, Answer(*group_.model()));
  const absl::Status active = group_.CheckActive();
  outbox_.Respond(request, !active.ok() ? active
                                        : absl::FailedPreconditionError(
                                              "the workers hold no model: start them with --model FOLDER"));
}

void ClusterState::AppendTokens(RequestId request, const std::string& session, std::optional<int64_t> at,
                                std::vector<int32_t> ids, int64_t now_ms) {
  jobs_.Append(request, session, at, std::move(ids), now_ms);
}

void ClusterState::Generate(RequestId request, const v1::GenerateRequest& args, int64_t now_ms) {
  jobs_.Generate(request, args, now_ms);
}

void ClusterState::Score(RequestId request, const v1::ScoreRequest& args, int64_t now_ms) {
  jobs_.Score(request, args, now_ms);
}

void ClusterState::Embed(RequestId request, const v1::EmbedRequest& args, int64_t now_ms) {
  jobs_.Embed(request, args, now_ms);
}

void ClusterState::ForkSession(RequestId request, const v1::ForkSessionRequest& args, int64_t unix_ms,
                               int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> parent = jobs_.FindIdle(args.session());
  if (!parent.ok()) return outbox_.Respond(request, parent.status());
  sessions_.Fork(request, **parent, args.name(), unix_ms, now_ms);
}

// ---- The rest

void ClusterState::Cancel(RequestId request, int64_t now_ms) {
  if (queries_.Cancel(request) || jobs_.Cancel(request, now_ms)) return;
  sessions_.Cancel(request);
  appends_.Cancel(request, now_ms);
}

void ClusterState::Persisted(uint64_t id, const absl::Status& status, int64_t now_ms) {
  journal_.Persisted(id, status, now_ms);
}

void ClusterState::Tick(int64_t now_ms) {
  group_.Tick(now_ms);
  reopening_.Tick(now_ms);
  appends_.Tick(now_ms);
  jobs_.Tick(now_ms);
}

}  // namespace eduba
