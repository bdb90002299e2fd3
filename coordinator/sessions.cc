#include "coordinator/sessions.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/limits.h"
#include "rpc/placement.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

constexpr int kPageSizeDefault = 100;
constexpr int kPageSizeMax = 1000;

absl::Status NoModel() {
  return absl::FailedPreconditionError("the workers hold no model: start them with --model FOLDER");
}

absl::Status DataLoss(const SessionEntry& session) {
  const int64_t length = session.record.length();
  int64_t lost = 0;
  for (const LostStripes& share : session.lost_stripes) lost += share.positions;
  return absl::DataLossError(absl::StrCat(
      "session '", session.record.name, "' is without ", session.lost_stripes.empty() ? length : lost,
      " of its ", length, " positions: ", session.lost,
      "; start the workers that hold them, or delete it and append again"));
}

}  // namespace

v1::Command OpenCommand(const SessionRecord& record) {
  v1::Command command;
  v1::OpenSession* open = command.mutable_open_session();
  open->set_session_id(record.id);
  *open->mutable_spec() = record.spec;
  open->mutable_spec()->clear_notes();  // The caller's own.
  *open->mutable_placement() = PlacementToProto(record.placement);
  return command;
}

Sessions::Sessions(StoredState stored, Group* group, Journal* journal, Outbox* outbox)
    : group_(group), journal_(journal), outbox_(outbox), next_id_(stored.next_session_id) {
  for (SessionRecord& record : stored.sessions) {
    names_[record.id] = record.name;
    SessionEntry& session = sessions_[record.name];
    session.spec = std::make_shared<const v1::SessionSpec>(record.spec);
    session.recorded = record.length();
    session.record = std::move(record);
  }
}

absl::StatusOr<SessionEntry*> Sessions::Find(const std::string& name) {
  EDUBA_RETURN_IF_ERROR(ValidateSessionName(name));
  const auto it = sessions_.find(name);
  if (it == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat(
        "there is no session '", name, "': create it first, or ask for one that the list of sessions has"));
  }
  switch (it->second.phase) {
    case SessionEntry::Phase::kReady:
      return &it->second;
    case SessionEntry::Phase::kOpening:
    case SessionEntry::Phase::kRecording:
      return absl::AbortedError(
          absl::StrCat("session '", name, "' is being created by another call: retry in a moment"));
    case SessionEntry::Phase::kErasing:
    case SessionEntry::Phase::kClosing:
      break;
  }
  return absl::NotFoundError(absl::StrCat("session '", name, "' is being deleted"));
}

absl::StatusOr<SessionEntry*> Sessions::FindUsable(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, Find(name));
  if (!session->lost.empty()) return DataLoss(*session);
  EDUBA_RETURN_IF_ERROR(group_->CheckActive());
  if (!session->here) {
    return absl::UnavailableError(
        absl::StrCat("session '", name, "' is being opened again: retry in a moment"));
  }
  return session;
}

absl::StatusOr<SessionEntry*> Sessions::FindTensor(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindUsable(name));
  if (session->spec->has_model()) {
    return absl::FailedPreconditionError(
        absl::StrCat("session '", name,
                     "' is a model session: it takes token ids (AppendTokens, Generate, Score, Embed)"));
  }
  return session;
}

absl::StatusOr<SessionEntry*> Sessions::FindModel(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindUsable(name));
  if (!session->spec->has_model()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "session '", name, "' holds keys and values, not a model's tokens: create one with a model part"));
  }
  if (group_->model() == nullptr) return NoModel();
  return session;
}

SessionEntry* Sessions::ById(uint64_t id) {
  const auto it = names_.find(id);
  return it == names_.end() ? nullptr : &sessions_.at(it->second);
}

std::vector<SessionEntry*> Sessions::All() {
  std::vector<SessionEntry*> all;
  for (auto& [name, session] : sessions_) all.push_back(&session);
  return all;
}

Placement Sessions::Place(uint64_t session_id, const v1::SessionSpec& spec, int64_t version) const {
  Placement placement;
  placement.version = version;
  placement.nodes = group_->nodes();
  placement.stripe_pages = spec.stripe_pages();
  placement.first = static_cast<int64_t>(session_id % placement.nodes.size());
  return placement;
}

// ---- Creation

void Sessions::Create(RequestId request, const v1::CreateSessionRequest& args, int64_t unix_ms,
                      int64_t now_ms) {
  absl::Status status = ValidateSessionName(args.name());
  const v1::Model* model = group_->model();
  absl::StatusOr<v1::SessionSpec> spec = args.spec();
  if (!args.spec().has_model()) {
    spec = CompleteSpec(args.spec());
  } else if (model != nullptr) {
    spec = CompleteModelSpec(args.spec(), *model);
  }
  if (status.ok()) status = spec.status();
  if (status.ok()) status = CheckNew(args.name());
  if (status.ok()) status = group_->CheckActive();
  if (status.ok() && args.spec().has_model() && model == nullptr) status = NoModel();
  if (!status.ok()) return outbox_->Respond(request, status);
  SessionEntry* session = Add(request, args.name(), *std::move(spec), unix_ms);
  session->record.placement = Place(session->record.id, session->record.spec, 1);
  group_->Send(OpenCommand(session->record), now_ms,
               [this, id = session->record.id](const Answered& answered, int64_t now) {
                 OnOpened(id, answered, now);
               });
}

void Sessions::Fork(RequestId request, const SessionEntry& parent, const std::string& name, int64_t unix_ms,
                    int64_t now_ms) {
  const absl::Status status = CheckNew(name);
  if (!status.ok()) return outbox_->Respond(request, status);
  SessionEntry* fork = Add(request, name, parent.record.spec, unix_ms);
  fork->record.placement = parent.record.placement;  // It shares the parent's pages.
  fork->record.appends = parent.record.appends;
  fork->recorded = fork->record.length();
  v1::Command command;
  command.mutable_fork_session()->set_session_id(parent.record.id);
  command.mutable_fork_session()->set_fork_id(fork->record.id);
  group_->Send(
      std::move(command), now_ms,
      [this, id = fork->record.id](const Answered& answered, int64_t now) { OnOpened(id, answered, now); });
}

absl::Status Sessions::CheckNew(const std::string& name) const {
  EDUBA_RETURN_IF_ERROR(ValidateSessionName(name));
  const auto it = sessions_.find(name);
  if (it == sessions_.end()) return absl::OkStatus();
  if (it->second.phase == SessionEntry::Phase::kReady) {
    return absl::AlreadyExistsError(
        absl::StrCat("session '", name, "' exists already: choose another name or delete it"));
  }
  return absl::AbortedError(
      absl::StrCat("session '", name, "' is being created or deleted by another call: retry in a moment"));
}

SessionEntry* Sessions::Add(RequestId waiter, const std::string& name, v1::SessionSpec spec,
                            int64_t unix_ms) {
  SessionEntry& session = sessions_[name];
  session.record.id = next_id_++;
  session.record.name = name;
  session.record.created_unix_ms = unix_ms;
  session.record.spec = std::move(spec);
  session.spec = std::make_shared<const v1::SessionSpec>(session.record.spec);
  session.phase = SessionEntry::Phase::kOpening;
  session.open_epoch = group_->epoch();
  session.waiter = waiter;
  names_[session.record.id] = name;
  return &session;
}

void Sessions::OnOpened(uint64_t id, const Answered& answered, int64_t now_ms) {
  SessionEntry* session = ById(id);
  const absl::Status status = group_->FirstFailure(answered);
  if (!status.ok()) {
    CloseOnWorkers(id, now_ms);
    outbox_->Respond(session->waiter, status);
    return Forget(id);
  }
  session->phase = SessionEntry::Phase::kRecording;
  journal_->Write(SessionCreated{session->record},
                  [this, id](const absl::Status& written, int64_t now) { OnRecorded(id, written, now); });
}

void Sessions::OnRecorded(uint64_t id, const absl::Status& status, int64_t now_ms) {
  SessionEntry* session = ById(id);
  // The epoch may have ended in between. Then no other one has begun (Journal), and it will open the session.
  const bool open = group_->active() && session->open_epoch == group_->epoch();
  if (!status.ok()) {
    if (open) CloseOnWorkers(id, now_ms);
    outbox_->Respond(session->waiter, status);
    return Forget(id);
  }
  session->phase = SessionEntry::Phase::kReady;
  session->here = open;
  outbox_->Respond(std::exchange(session->waiter, 0), Answer(Describe(*session)));
}

// ---- Questions

v1::Session Sessions::Describe(const SessionEntry& session) const {
  v1::Session answer;
  answer.set_name(session.record.name);
  *answer.mutable_spec() = session.record.spec;
  answer.set_length(session.record.length());
  if (!session.spec->has_model()) {
    answer.set_bytes(session.record.length() * session.spec->layers() * PositionBytes(*session.spec));
  } else if (const v1::Model* model = group_->model(); model != nullptr) {
    answer.set_bytes(ModelSessionBytes(*session.spec, *model, session.record.length()));
  }
  answer.set_lost(!session.lost.empty());
  answer.set_created_unix_ms(session.record.created_unix_ms);
  return answer;
}

void Sessions::Get(RequestId request, const v1::GetSessionRequest& args) {
  const absl::StatusOr<SessionEntry*> session = Find(args.name());
  if (!session.ok()) return outbox_->Respond(request, session.status());
  outbox_->Respond(request, Answer(Describe(**session)));
}

void Sessions::List(RequestId request, const v1::ListSessionsRequest& args) {
  if (args.page_size() < 0 || args.page_size() > kPageSizeMax) {
    return outbox_->Respond(
        request, absl::InvalidArgumentError(absl::StrCat("page_size is ", args.page_size(), ", wanted 0 (",
                                                         kPageSizeDefault, ") to ", kPageSizeMax)));
  }
  const int page_size = args.page_size() == 0 ? kPageSizeDefault : args.page_size();
  v1::ListSessionsResponse response;
  int64_t bytes = 0;
  // The token is the last name of the page before.
  for (auto it = sessions_.upper_bound(args.page_token()); it != sessions_.end(); ++it) {
    if (it->second.phase != SessionEntry::Phase::kReady) continue;
    v1::Session session = Describe(it->second);
    session.mutable_spec()->clear_notes();
    bytes += static_cast<int64_t>(session.ByteSizeLong());
    if (response.sessions_size() == page_size || (bytes > kPayloadBytesMax && response.sessions_size() > 0)) {
      response.set_next_page_token(response.sessions(response.sessions_size() - 1).name());
      break;
    }
    *response.add_sessions() = std::move(session);
  }
  outbox_->Respond(request, Answer(std::move(response)));
}

// ---- Deletion

void Sessions::Delete(RequestId request, SessionEntry* session, std::function<void(int64_t now_ms)> on_kept) {
  session->phase = SessionEntry::Phase::kErasing;
  session->waiter = request;
  journal_->Write(SessionErased{session->record.id},
                  [this, id = session->record.id, on_kept = std::move(on_kept)](
                      const absl::Status& status, int64_t now) { OnErased(id, status, on_kept, now); });
}

void Sessions::OnErased(uint64_t id, const absl::Status& status,
                        const std::function<void(int64_t now_ms)>& on_kept, int64_t now_ms) {
  SessionEntry* session = ById(id);
  if (!status.ok()) {
    session->phase = SessionEntry::Phase::kReady;
    outbox_->Respond(std::exchange(session->waiter, 0), status);
    return on_kept(now_ms);
  }
  session->phase = SessionEntry::Phase::kClosing;
  // Workers of a later epoch drop what they are not told of.
  if (!group_->active() || session->open_epoch != group_->epoch()) return OnClosed(id);
  CloseOnWorkers(id, now_ms);
}

void Sessions::CloseOnWorkers(uint64_t id, int64_t now_ms) {
  v1::Command command;
  command.mutable_close_session()->set_session_id(id);
  group_->Send(std::move(command), now_ms, [this, id](const Answered&, int64_t) { OnClosed(id); });
}

void Sessions::OnClosed(uint64_t id) {
  SessionEntry* session = ById(id);
  if (session == nullptr || session->phase != SessionEntry::Phase::kClosing) return;
  outbox_->Respond(session->waiter, Answer(Done{}));
  Forget(id);
}

void Sessions::Forget(uint64_t id) {
  const auto it = names_.find(id);
  sessions_.erase(it->second);
  names_.erase(it);
}

void Sessions::Cancel(RequestId request) {
  for (auto& [name, session] : sessions_) {
    if (session.waiter == request) session.waiter = 0;
  }
}

void Sessions::OnOver(const std::string& why) {
  std::vector<uint64_t> closing;
  std::vector<uint64_t> opening;
  for (auto& [name, session] : sessions_) {
    session.here = false;
    if (session.phase == SessionEntry::Phase::kOpening) opening.push_back(session.record.id);
    if (session.phase == SessionEntry::Phase::kClosing) closing.push_back(session.record.id);
  }
  for (const uint64_t id : closing) OnClosed(id);
  for (const uint64_t id : opening) {
    outbox_->Respond(ById(id)->waiter, absl::UnavailableError(absl::StrCat(why, ": retry")));
    Forget(id);
  }
}

}  // namespace eduba
