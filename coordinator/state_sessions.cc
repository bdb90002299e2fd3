// ClusterState: sessions.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "coordinator/state.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

constexpr int kPageSizeDefault = 100;
constexpr int kPageSizeMax = 1000;

}  // namespace

absl::StatusOr<ClusterState::SessionEntry*> ClusterState::FindSession(const std::string& name) {
  EDUBA_RETURN_IF_ERROR(ValidateSessionName(name));
  const auto it = sessions_.find(name);
  if (it == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat(
        "there is no session '", name, "': create it first, or ask for one that the list of sessions has"));
  }
  switch (it->second.phase) {
    case SessionPhase::kReady:
      return &it->second;
    case SessionPhase::kOpening:
    case SessionPhase::kRecording:
      return absl::AbortedError(
          absl::StrCat("session '", name, "' is being created by another call: retry in a moment"));
    case SessionPhase::kErasing:
    case SessionPhase::kClosing:
      break;
  }
  return absl::NotFoundError(absl::StrCat("session '", name, "' is being deleted"));
}

ClusterState::SessionEntry* ClusterState::SessionById(uint64_t id) {
  const auto it = session_names_.find(id);
  return it == session_names_.end() ? nullptr : &sessions_.at(it->second);
}

absl::StatusOr<ClusterState::SessionEntry*> ClusterState::FindUsable(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindSession(name));
  if (!session->lost.empty()) {
    return absl::DataLossError(absl::StrCat("session '", name, "' lost its ", session->record.length(),
                                            " positions, which were in the workers' memory: ", session->lost,
                                            "; delete it and append again"));
  }
  EDUBA_RETURN_IF_ERROR(CheckActive());
  return session;
}

absl::StatusOr<ClusterState::SessionEntry*> ClusterState::FindTensorSession(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindUsable(name));
  if (session->spec->has_model()) {
    return absl::FailedPreconditionError(
        absl::StrCat("session '", name,
                     "' is a model session: it takes token ids (AppendTokens, Generate, Score, Embed)"));
  }
  return session;
}

v1::Session ClusterState::Describe(const SessionEntry& session) const {
  v1::Session answer;
  answer.set_name(session.record.name);
  *answer.mutable_spec() = session.record.spec;
  answer.set_length(session.record.length());
  if (!session.spec->has_model()) {
    answer.set_bytes(session.record.length() * session.spec->layers() * PositionBytes(*session.spec));
  } else if (const v1::Model* model = CurrentModel(); model != nullptr) {
    answer.set_bytes(ModelSessionBytes(*session.spec, *model, session.record.length()));
  }
  answer.set_lost(!session.lost.empty());
  answer.set_created_unix_ms(session.record.created_unix_ms);
  return answer;
}

void ClusterState::CreateSession(RequestId request, const v1::CreateSessionRequest& args, int64_t unix_ms,
                                 int64_t now_ms) {
  absl::Status status = ValidateSessionName(args.name());
  const v1::Model* model = CurrentModel();
  absl::StatusOr<v1::SessionSpec> spec = args.spec();
  if (!args.spec().has_model()) {
    spec = CompleteSpec(args.spec());
  } else if (model != nullptr) {
    spec = CompleteModelSpec(args.spec(), *model);
  }
  if (status.ok()) status = spec.status();
  if (status.ok()) status = CheckNewName(args.name());
  if (status.ok()) status = CheckActive();
  if (status.ok() && args.spec().has_model() && model == nullptr) {
    status = absl::FailedPreconditionError("the workers hold no model: start them with --model FOLDER");
  }
  if (!status.ok()) return Respond(request, status);
  OpenOnWorkers(AddSession(request, args.name(), *std::move(spec), unix_ms), now_ms);
}

absl::Status ClusterState::CheckNewName(const std::string& name) const {
  EDUBA_RETURN_IF_ERROR(ValidateSessionName(name));
  const auto it = sessions_.find(name);
  if (it == sessions_.end()) return absl::OkStatus();
  if (it->second.phase == SessionPhase::kReady) {
    return absl::AlreadyExistsError(
        absl::StrCat("session '", name, "' exists already: choose another name or delete it"));
  }
  return absl::AbortedError(
      absl::StrCat("session '", name, "' is being created or deleted by another call: retry in a moment"));
}

ClusterState::SessionEntry* ClusterState::AddSession(RequestId waiter, const std::string& name,
                                                     v1::SessionSpec spec, int64_t unix_ms) {
  SessionEntry& session = sessions_[name];
  session.record.id = next_session_id_++;
  session.record.name = name;
  session.record.created_unix_ms = unix_ms;
  session.record.spec = std::move(spec);
  session.spec = std::make_shared<const v1::SessionSpec>(session.record.spec);
  session.phase = SessionPhase::kOpening;
  session.waiter = waiter;
  session_names_[session.record.id] = name;
  return &session;
}

void ClusterState::OpenOnWorkers(SessionEntry* session, int64_t now_ms) {
  session->open_epoch = epoch_;
  v1::Command command;
  command.mutable_open_session()->set_session_id(session->record.id);
  v1::SessionSpec* spec = command.mutable_open_session()->mutable_spec();
  *spec = session->record.spec;
  spec->clear_notes();  // the caller's own
  Command({CommandKind::kOpenSession, session->record.id, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::CloseOnWorkers(SessionEntry* session, int64_t now_ms) {
  v1::Command command;
  command.mutable_close_session()->set_session_id(session->record.id);
  Command({CommandKind::kCloseSession, session->record.id, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::OnOpened(const PendingCommand& command, int64_t now_ms) {
  SessionEntry* session = SessionById(command.subject);
  if (session == nullptr) return;
  const absl::Status status = FirstFailure(command);
  if (session->phase == SessionPhase::kOpening) {
    if (status.ok()) {
      session->phase = SessionPhase::kRecording;
      return Write(SessionCreated{session->record}, command.subject);
    }
    CloseOnWorkers(session, now_ms);
    Respond(session->waiter, status);
    return Forget(command.subject);
  }
  // A new epoch's workers did not take a session that they had room for before.
  if (!status.ok() && session->phase == SessionPhase::kReady) {
    session->lost = absl::StrCat("it could not be opened again: ", std::string(status.message()));
  }
}

void ClusterState::OnSessionRecorded(uint64_t session_id, const absl::Status& status, int64_t now_ms) {
  SessionEntry* session = SessionById(session_id);
  const bool open = phase_ == Phase::kActive && session->open_epoch == epoch_;
  if (!status.ok()) {
    if (open) CloseOnWorkers(session, now_ms);
    Respond(session->waiter, status);
    return Forget(session_id);
  }
  session->phase = SessionPhase::kReady;
  if (phase_ == Phase::kActive && !open) OpenOnWorkers(session, now_ms);
  Respond(std::exchange(session->waiter, 0), Answer(Describe(*session)));
}

void ClusterState::GetSession(RequestId request, const v1::GetSessionRequest& args) {
  const absl::StatusOr<SessionEntry*> session = FindSession(args.name());
  if (!session.ok()) return Respond(request, session.status());
  Respond(request, Answer(Describe(**session)));
}

void ClusterState::ListSessions(RequestId request, const v1::ListSessionsRequest& args) {
  if (args.page_size() < 0 || args.page_size() > kPageSizeMax) {
    return Respond(request,
                   absl::InvalidArgumentError(absl::StrCat("page_size is ", args.page_size(), ", wanted 0 (",
                                                           kPageSizeDefault, ") to ", kPageSizeMax)));
  }
  const int page_size = args.page_size() == 0 ? kPageSizeDefault : args.page_size();
  v1::ListSessionsResponse response;
  int64_t bytes = 0;
  // The token is the last name of the page before.
  for (auto it = sessions_.upper_bound(args.page_token()); it != sessions_.end(); ++it) {
    if (it->second.phase != SessionPhase::kReady) continue;
    v1::Session session = Describe(it->second);
    session.mutable_spec()->clear_notes();
    bytes += static_cast<int64_t>(session.ByteSizeLong());
    if (response.sessions_size() == page_size || (bytes > kPayloadBytesMax && response.sessions_size() > 0)) {
      response.set_next_page_token(response.sessions(response.sessions_size() - 1).name());
      break;
    }
    *response.add_sessions() = std::move(session);
  }
  Respond(request, Answer(std::move(response)));
}

void ClusterState::DeleteSession(RequestId request, const v1::DeleteSessionRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindSession(args.name());
  if (!found.ok()) return Respond(request, found.status());
  SessionEntry* session = *found;
  if (session->append_id != 0) {
    const AppendEntry& append = appends_.at(session->append_id);
    if (append.phase == AppendPhase::kRecording || append.phase == AppendPhase::kPublishing) {
      return Respond(request, absl::AbortedError(absl::StrCat("an append to session '", args.name(),
                                                              "' is being committed: retry in a moment")));
    }
    Undo(append.id, absl::NotFoundError(absl::StrCat("session '", args.name(), "' was deleted")), now_ms);
  }
  const absl::Status deleted =
      absl::NotFoundError(absl::StrCat("session '", args.name(), "' was deleted during the call"));
  FailCallsOf(session->record.id, deleted);
  FailModelJobsOf(session->record.id, deleted);
  session->phase = SessionPhase::kErasing;
  session->waiter = request;
  Write(SessionErased{session->record.id}, session->record.id);
}

void ClusterState::OnSessionErased(uint64_t session_id, const absl::Status& status, int64_t now_ms) {
  SessionEntry* session = SessionById(session_id);
  if (!status.ok()) {
    session->phase = SessionPhase::kReady;
    if (phase_ == Phase::kActive && session->open_epoch != epoch_ && session->lost.empty()) {
      OpenOnWorkers(session, now_ms);
    }
    CancelModelJobsOf(session_id, now_ms);  // Their calls have been told that it is deleted.
    return Respond(std::exchange(session->waiter, 0), status);
  }
  session->phase = SessionPhase::kClosing;
  if (phase_ == Phase::kActive && session->open_epoch == epoch_) return CloseOnWorkers(session, now_ms);
  OnClosed(session_id);
}

void ClusterState::OnClosed(uint64_t session_id) {
  SessionEntry* session = SessionById(session_id);
  if (session == nullptr || session->phase != SessionPhase::kClosing) return;
  Respond(session->waiter, Answer(Done{}));
  Forget(session_id);
}

void ClusterState::Forget(uint64_t session_id) {
  const auto it = session_names_.find(session_id);
  sessions_.erase(it->second);
  session_names_.erase(it);
}

void ClusterState::SessionsLoseTheirEpoch(const std::string& why) {
  std::vector<uint64_t> closing;
  std::vector<uint64_t> opening;
  for (auto& [name, session] : sessions_) {
    if (recording_jobs_.count(session.record.id) == 0) session.model_job = 0;
    if (session.phase == SessionPhase::kOpening) opening.push_back(session.record.id);
    if (session.phase == SessionPhase::kClosing) closing.push_back(session.record.id);
    if (session.record.length() > 0 && session.lost.empty()) session.lost = why;
  }
  // Workers drop a dead epoch's sessions by themselves.
  for (const uint64_t id : closing) OnClosed(id);
  for (const uint64_t id : opening) {
    Respond(SessionById(id)->waiter, absl::UnavailableError(absl::StrCat(why, ": retry")));
    Forget(id);
  }
}

}  // namespace eduba
