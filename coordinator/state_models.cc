// ClusterState: sessions of the workers' model (docs/adr/0008).
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "coordinator/state.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

static_assert(std::endian::native == std::endian::little, "token ids travel as little-endian int32");

template <typename T>
absl::StatusOr<std::vector<T>> Numbers(const std::string& bytes, const std::string& what) {
  if (bytes.empty() || bytes.size() % sizeof(T) != 0 ||
      static_cast<int64_t>(bytes.size()) > kPayloadBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(what, " have ", bytes.size(),
                                                   " bytes, wanted a multiple of ", sizeof(T), " from ",
                                                   sizeof(T), " to ", kPayloadBytesMax));
  }
  std::vector<T> numbers(bytes.size() / sizeof(T));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return numbers;
}

absl::Status CheckIds(const std::vector<int32_t>& ids, int64_t vocab, const std::string& what) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": id ", i, " is ", ids[i], ", wanted 0 to ", vocab - 1));
    }
  }
  return absl::OkStatus();
}

std::string Outcome(const v1::CommandResult& result) {
  const auto code = static_cast<absl::StatusCode>(result.code());
  return result.code() == 0 ? "OK"
                            : absl::StrCat(absl::StatusCodeToString(code), " (", result.message(), ")");
}

absl::Status WorkerGaveNonsense(int rank) {
  return absl::InternalError(
      absl::StrCat("worker ", rank, " gave an answer that makes no sense: the group starts anew; retry"));
}

}  // namespace

const v1::Model* ClusterState::CurrentModel() const {
  for (const auto& [id, worker] : workers_) {
    if (worker.greeted && worker.hello.has_model()) return &worker.hello.model();
  }
  return nullptr;
}

void ClusterState::GetModel(RequestId request) {
  if (const v1::Model* model = CurrentModel(); model != nullptr) return Respond(request, Answer(*model));
  const absl::Status active = CheckActive();
  Respond(request, !active.ok() ? active
                                : absl::FailedPreconditionError(
                                      "the workers hold no model: start them with --model FOLDER"));
}

absl::StatusOr<ClusterState::SessionEntry*> ClusterState::FindModelSession(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindUsable(name));
  if (!session->spec->has_model()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "session '", name, "' holds keys and values, not a model's tokens: create one with a model part"));
  }
  if (CurrentModel() == nullptr) {
    return absl::FailedPreconditionError("the workers hold no model: start them with --model FOLDER");
  }
  return session;
}

absl::StatusOr<ClusterState::SessionEntry*> ClusterState::FindExtensible(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, FindModelSession(name));
  if (session->model_job != 0) {
    return absl::AbortedError(absl::StrCat("session '", name,
                                           "' is being extended by another append or generation: retry when "
                                           "it has ended"));
  }
  return session;
}

uint64_t ClusterState::StartModelJob(ModelJob job, v1::Command command, int64_t now_ms) {
  const uint64_t ordinal = next_ordinal_;
  job.started_ms = now_ms;
  model_jobs_.emplace(ordinal, std::move(job));
  Command({CommandKind::kModelJob, ordinal, 0, {}, 0, {}}, std::move(command), now_ms);
  return ordinal;
}

void ClusterState::AppendTokens(RequestId request, const std::string& name, std::optional<int64_t> given_at,
                                std::vector<int32_t> ids, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindExtensible(name);
  if (!found.ok()) return Respond(request, found.status());
  SessionEntry* session = *found;
  const std::string to = absl::StrCat("append to session '", name, "'");
  // The session's own sinks count as being there, and are read ahead of the first tokens.
  const int64_t sinks = std::max<int64_t>(0, DedicatedSinks(*session->spec) - session->record.length());
  const int64_t length = session->record.length() + sinks;
  const int64_t at = given_at.value_or(length);
  const auto count = static_cast<int64_t>(ids.size());
  if (count < 1 || count > kTokenIdsMax) {
    return Respond(request, absl::InvalidArgumentError(absl::StrCat(
                                to, ": a message of ", count, " token ids, wanted 1 to ", kTokenIdsMax)));
  }
  if (at < 0) {
    return Respond(request,
                   absl::InvalidArgumentError(absl::StrCat(to, ": at is ", at, ", wanted 0 or more")));
  }
  if (at > length) {
    return Respond(request, absl::OutOfRangeError(
                                absl::StrCat(to, ": it starts at ", at, ", but the session has ", length,
                                             " tokens: a gap is not allowed, append at ", length)));
  }
  if (count > kMaxPositions - at) {
    return Respond(request, absl::OutOfRangeError(absl::StrCat(to, ": ", count, " tokens at ", at,
                                                               " would pass the limit of ", kMaxPositions)));
  }
  const absl::Status known = CheckIds(ids, CurrentModel()->vocab_size(), to);
  if (!known.ok()) return Respond(request, known);
  const int64_t stored = std::min(count, length - at);
  std::vector<int32_t> there(stored, session->spec->model().sink_token());
  const int64_t read = std::clamp<int64_t>(session->record.length() - at, 0, stored);
  if (read > 0) {
    const absl::Status is_read = session->ids.Read(at, absl::MakeSpan(there).first(read));
    if (!is_read.ok()) return Respond(request, Annotate(is_read, to));
  }
  for (int64_t i = 0; i < stored; ++i) {
    if (there[i] == ids[i]) continue;
    return Respond(request, absl::AlreadyExistsError(absl::StrCat(to, ": position ", at + i, " holds ",
                                                                  i < read ? "token " : "the sink token ",
                                                                  there[i], " already, not ", ids[i])));
  }
  if (stored == count && sinks == 0) {
    v1::AppendTokensReceipt receipt;
    receipt.set_at(at);
    receipt.set_count(count);
    receipt.set_length(length);
    receipt.set_already_stored(count);
    return Respond(request, Answer(receipt));
  }

  ids.erase(ids.begin(), ids.begin() + stored);
  ids.insert(ids.begin(), sinks, session->spec->model().sink_token());
  v1::Command command;
  command.mutable_model_append()->set_session_id(session->record.id);
  command.mutable_model_append()->set_ids(ids.data(), ids.size() * sizeof(int32_t));
  ModelJob job;
  job.kind = ModelJob::Kind::kAppend;
  job.request = request;
  job.session_id = session->record.id;
  job.ids = std::move(ids);
  job.at = at;
  job.already_stored = stored;
  job.sinks = sinks;
  session->model_job = StartModelJob(std::move(job), std::move(command), now_ms);
}

absl::Status ClusterState::CheckNotEmpty(const SessionEntry& session, const std::string& what) {
  if (session.record.length() == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(what, ": it is empty, and a first token has nothing to follow: append one before"));
  }
  // An append that had no memory may have ended among them.
  if (session.record.length() < DedicatedSinks(*session.spec)) {
    return absl::FailedPreconditionError(absl::StrCat(what, ": it has ", session.record.length(), " of its ",
                                                      DedicatedSinks(*session.spec),
                                                      " sink tokens only: append its first tokens again"));
  }
  return absl::OkStatus();
}

absl::Status ClusterState::CheckSinkMass(bool wanted, const std::string& what) const {
  const v1::Model& model = *CurrentModel();
  const int64_t heads = int64_t{model.layer_windows_size()} * model.query_heads();
  if (!wanted || heads <= kSinkMassHeadsMax) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": the model has ", heads,
                                                 " heads in all its layers; sink mass is told for at most ",
                                                 kSinkMassHeadsMax));
}

void ClusterState::Generate(RequestId request, const v1::GenerateRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindExtensible(args.session());
  if (!found.ok()) return Respond(request, found.status());
  SessionEntry* session = *found;
  absl::Status status = CheckGenerateRequest(args, *CurrentModel());
  const int64_t length = session->record.length();
  const std::string from = absl::StrCat("generation from session '", args.session(), "'");
  if (status.ok()) status = CheckNotEmpty(*session, from);
  if (status.ok()) status = CheckSinkMass(args.sink_mass(), from);
  if (status.ok() && args.max_tokens() > kMaxPositions - length) {
    status = absl::OutOfRangeError(absl::StrCat(from, ": ", args.max_tokens(), " tokens behind ", length,
                                                " would pass the limit of ", kMaxPositions));
  }
  if (!status.ok()) return Respond(request, status);

  v1::Command command;
  command.mutable_model_generate()->set_session_id(session->record.id);
  *command.mutable_model_generate()->mutable_request() = args;
  ModelJob job;
  job.kind = ModelJob::Kind::kGenerate;
  job.request = request;
  job.session_id = session->record.id;
  job.sink_mass = args.sink_mass();
  if (IsWindowed(*session->spec, *CurrentModel())) {
    job.home = IdlestHome();
    command.mutable_model_generate()->set_owner_rank(*job.home);
  }
  if (args.time_limit_ms() > 0) {
    job.deadline_ms = now_ms + std::min(args.time_limit_ms(), std::numeric_limits<int64_t>::max() - now_ms);
  }
  session->model_job = StartModelJob(std::move(job), std::move(command), now_ms);
}

int ClusterState::IdlestHome() const {
  std::vector<int> generations(options_.group_size, 0);
  for (const auto& [ordinal, job] : model_jobs_) {
    if (job.home) ++generations[*job.home];
  }
  return static_cast<int>(std::min_element(generations.begin(), generations.end()) - generations.begin());
}

// Questions see the session as it is between two extensions: what a client cannot know, it cannot ask about.
void ClusterState::Score(RequestId request, const v1::ScoreRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindExtensible(args.session());
  if (!found.ok()) return Respond(request, found.status());
  const std::string of = absl::StrCat("score on session '", args.session(), "'");
  const auto ids = Numbers<int32_t>(args.ids(), absl::StrCat(of, ": ids"));
  absl::Status status = ids.status();
  if (status.ok()) status = CheckIds(*ids, CurrentModel()->vocab_size(), of);
  if (status.ok()) status = CheckNotEmpty(**found, of);
  if (status.ok()) status = CheckSinkMass(args.sink_mass(), of);
  if (!status.ok()) return Respond(request, status);

  v1::Command command;
  command.mutable_model_score()->set_session_id((*found)->record.id);
  command.mutable_model_score()->set_ids(args.ids());
  command.mutable_model_score()->set_sink_mass(args.sink_mass());
  ModelJob job;
  job.kind = ModelJob::Kind::kScore;
  job.sink_mass = args.sink_mass();
  job.request = request;
  job.session_id = (*found)->record.id;
  job.ids = *ids;
  StartModelJob(std::move(job), std::move(command), now_ms);
}

void ClusterState::Embed(RequestId request, const v1::EmbedRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindExtensible(args.session());
  if (!found.ok()) return Respond(request, found.status());
  const std::string of = absl::StrCat("embedding of session '", args.session(), "'");
  const auto bounds = Numbers<int64_t>(args.ranges(), absl::StrCat(of, ": ranges"));
  if (!bounds.ok()) return Respond(request, bounds.status());
  const int64_t length = (*found)->record.length();
  int64_t end = 0;
  for (size_t i = 0; i < bounds->size(); i += 2) {
    if (i + 1 == bounds->size() || (*bounds)[i] < end || (*bounds)[i + 1] <= (*bounds)[i]) {
      return Respond(request,
                     absl::InvalidArgumentError(absl::StrCat(
                         of, ": range ", i / 2,
                         " is empty, or does not begin behind the one before it; wanted ascending pairs "
                         "of positions [begin, end)")));
    }
    end = (*bounds)[i + 1];
    if (end > length) {
      return Respond(request,
                     absl::OutOfRangeError(absl::StrCat(of, ": range ", i / 2, " ends at ", end,
                                                        ", but the session has ", length, " tokens")));
    }
  }
  if (!v1::Pool_IsValid(args.pool())) {
    return Respond(request, absl::InvalidArgumentError(absl::StrCat(of, ": the pool is not known")));
  }

  v1::Command command;
  command.mutable_model_embed()->set_session_id((*found)->record.id);
  command.mutable_model_embed()->set_ranges(args.ranges());
  command.mutable_model_embed()->set_pool(args.pool());
  ModelJob job;
  job.kind = ModelJob::Kind::kEmbed;
  job.request = request;
  job.session_id = (*found)->record.id;
  job.ranges = static_cast<int64_t>(bounds->size() / 2);
  StartModelJob(std::move(job), std::move(command), now_ms);
}

void ClusterState::ForkSession(RequestId request, const v1::ForkSessionRequest& args, int64_t unix_ms,
                               int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindExtensible(args.session());
  absl::Status status = found.status();
  if (status.ok()) status = CheckNewName(args.name());
  if (!status.ok()) return Respond(request, status);
  SessionEntry* fork = AddSession(request, args.name(), (*found)->record.spec, unix_ms);
  const SessionEntry& session = sessions_.at(args.session());
  fork->record.appends = session.record.appends;
  fork->recorded = fork->record.length();
  fork->ids = session.ids;
  fork->open_epoch = epoch_;
  v1::Command command;
  command.mutable_fork_session()->set_session_id(session.record.id);
  command.mutable_fork_session()->set_fork_id(fork->record.id);
  Command({CommandKind::kOpenSession, fork->record.id, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::OnModelProgress(WorkerEntry* worker, v1::ModelProgress progress, int64_t now_ms) {
  if (phase_ != Phase::kActive || progress.epoch() != epoch_ || worker->rank < 0) return;
  // Commands wait behind the steps of jobs, which all ranks make together: while steps are made, none of them
  // is late.
  answered_ms_ = now_ms;
  const auto it = model_jobs_.find(progress.ordinal());
  if (it == model_jobs_.end()) return;
  ModelJob& job = it->second;
  if (worker->rank != job.teller()) {
    return Expel(worker->id, "told of a job that is another worker's to tell of", now_ms);
  }
  if (progress.has_tokens() && job.kind == ModelJob::Kind::kGenerate) {
    const auto ids = Numbers<int32_t>(progress.tokens().ids(), "generated ids");
    if (!ids.ok() || progress.tokens().log_probs().size() != progress.tokens().ids().size()) {
      return Expel(worker->id, "sent tokens of wrong sizes", now_ms);
    }
    job.ids.insert(job.ids.end(), ids->begin(), ids->end());
    if (job.request != 0) Emit(Generated{job.request, std::move(*progress.mutable_tokens())});
  }
  if (progress.has_embeddings() && job.kind == ModelJob::Kind::kEmbed) {
    const v1::EmbedResponse& rows = progress.embeddings();
    const auto wanted = static_cast<size_t>(rows.count()) * CurrentModel()->hidden_size() * sizeof(float);
    if (rows.first_range() != job.embedded || rows.count() < 1 || rows.vectors().size() != wanted) {
      return Expel(worker->id, "sent embeddings of wrong sizes", now_ms);
    }
    job.embedded += rows.count();
    if (job.request != 0) Emit(Embedded{job.request, std::move(*progress.mutable_embeddings())});
  }
}

void ClusterState::OnModelJob(const PendingCommand& command, int64_t now_ms) {
  const auto it = model_jobs_.find(command.subject);
  if (it == model_jobs_.end()) return;
  const ModelJob job = std::move(it->second);
  model_jobs_.erase(it);
  const v1::CommandResult& told = *command.results[job.teller()];
  for (const WorkerEntry* worker : Ranks()) {
    const v1::CommandResult& result = *command.results[worker->rank];
    const std::string teller = absl::StrCat("worker ", job.teller());
    std::string differs;
    if (result.code() != told.code()) {
      differs = absl::StrCat("ended with ", Outcome(result), ", and ", teller, " with ", Outcome(told));
    } else if (result.model().done() != told.model().done()) {
      differs =
          absl::StrCat("did ", result.model().done(), " tokens, and ", teller, " ", told.model().done());
    } else if (!job.home && result.model().digest() != told.model().digest()) {
      differs = absl::StrCat("computed other bits than ", teller);
    } else {
      continue;  // Others than a home have no bits of their own.
    }
    differs = absl::StrCat(NameOf(*worker), " ", differs);
    Respond(job.request, absl::InternalError(absl::StrCat(differs,
                                                          "; this is a fault of the machine "
                                                          "or of Eduba: the group starts anew")));
    return EndEpoch(differs, now_ms);
  }
  SessionEntry* session = SessionById(job.session_id);
  // Deleted meanwhile; its calls have been told.
  if (session == nullptr || session->phase == SessionPhase::kClosing) return;
  const bool extends = job.kind == ModelJob::Kind::kAppend || job.kind == ModelJob::Kind::kGenerate;
  const int64_t done = told.model().done();
  if (extends) {
    if (done < 0 || done > static_cast<int64_t>(job.ids.size()) ||
        (job.kind == ModelJob::Kind::kGenerate && done != static_cast<int64_t>(job.ids.size()))) {
      Respond(job.request, WorkerGaveNonsense(job.teller()));
      return Expel(Ranks()[job.teller()]->id,
                   absl::StrCat("answered that ", done, " of ", job.ids.size(), " tokens are read"), now_ms);
    }
    if (done > 0) {
      session->ids.Append(absl::MakeConstSpan(job.ids).first(done));
      const int64_t length = session->record.length() + done;
      // Borders of appends mean nothing where the ids themselves are compared.
      session->record.appends = {{0, length, {}}};
      // Written down before the client hears of it, as for other appends: what it was told of is never
      // forgotten silently. (What an earlier write could not store is stored with it.)
      if (session->phase == SessionPhase::kReady) {
        Write(AppendCommitted{job.session_id, {session->recorded, length - session->recorded, {}}}, 0);
        recording_jobs_[job.session_id] = {job, told};
        return;
      }
    }
    session->model_job = 0;
  }
  ReplyToJob(job, *session, told, now_ms);
}

void ClusterState::OnTokensRecorded(uint64_t session_id, const absl::Status& status, int64_t now_ms) {
  const auto node = recording_jobs_.extract(session_id);
  SessionEntry* session = SessionById(session_id);
  if (session == nullptr) return;
  session->model_job = 0;
  const auto& [job, result] = node.mapped();
  if (status.ok()) {
    session->recorded = session->record.length();
    return ReplyToJob(job, *session, result, now_ms);
  }
  Respond(
      job.request,
      absl::Status(status.code(),
                   absl::StrCat("session '", session->record.name, "' has ", session->record.length(),
                                " tokens now, but they are not on record: ", std::string(status.message()))));
}

void ClusterState::ReplyToJob(const ModelJob& job, const SessionEntry& session,
                              const v1::CommandResult& result, int64_t now_ms) {
  if (job.request == 0) return;
  const int64_t done = result.model().done();
  const int64_t length = session.record.length();
  if (result.code() != 0) {
    std::string how_far;
    if (job.kind == ModelJob::Kind::kAppend || job.kind == ModelJob::Kind::kGenerate) {
      how_far = absl::StrCat("; ", done, " tokens of it are in the session, which has ", length, " now");
    }
    return Respond(job.request, absl::Status(static_cast<absl::StatusCode>(result.code()),
                                             absl::StrCat("session '", session.record.name,
                                                          "': ", result.message(), how_far)));
  }
  const int64_t mass_bytes = int64_t{4} * session.spec->layers() * session.spec->query_heads();
  if (static_cast<int64_t>(result.model().sink_mass().size()) != (job.sink_mass ? mass_bytes : 0)) {
    Respond(job.request, WorkerGaveNonsense(job.teller()));
    return Expel(Ranks()[job.teller()]->id, "answered sink mass of a wrong size", now_ms);
  }
  switch (job.kind) {
    case ModelJob::Kind::kAppend: {
      v1::AppendTokensReceipt receipt;
      receipt.set_at(job.at);
      receipt.set_count(job.already_stored + done - job.sinks);
      receipt.set_length(length);
      receipt.set_already_stored(job.already_stored);
      return Respond(job.request, Answer(receipt));
    }
    case ModelJob::Kind::kGenerate: {
      v1::GenerateSummary summary;
      summary.set_tokens(done);
      summary.set_length(length);
      summary.set_finish_reason(result.model().cancelled() ? v1::FINISH_REASON_DEADLINE
                                                           : result.model().finish_reason());
      summary.set_seconds(static_cast<double>(now_ms - job.started_ms) / 1000);
      summary.set_sink_mass(result.model().sink_mass());
      return Respond(job.request, Answer(summary));
    }
    case ModelJob::Kind::kScore: {
      if (result.model().log_probs().size() != job.ids.size() * sizeof(float)) {
        Respond(job.request, WorkerGaveNonsense(job.teller()));
        return Expel(Ranks()[job.teller()]->id, "answered log-probabilities of a wrong size", now_ms);
      }
      v1::ScoreResponse response;
      response.set_log_probs(result.model().log_probs());
      response.set_sink_mass(result.model().sink_mass());
      return Respond(job.request, Answer(std::move(response)));
    }
    case ModelJob::Kind::kEmbed:
      if (job.embedded != job.ranges) {
        Respond(job.request, WorkerGaveNonsense(job.teller()));
        return Expel(Ranks()[job.teller()]->id,
                     absl::StrCat("embedded ", job.embedded, " of ", job.ranges, " ranges"), now_ms);
      }
      return Respond(job.request, Answer(Done{}));
  }
}

void ClusterState::CancelModelJob(uint64_t ordinal, int64_t now_ms) {
  ModelJob& job = model_jobs_.at(ordinal);
  if (std::exchange(job.cancelled, true)) return;
  v1::Command command;
  command.mutable_cancel_job()->set_ordinal(ordinal);
  Command({CommandKind::kCancelJob, ordinal, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::EndLateModelJobs(int64_t now_ms) {
  for (const auto& [ordinal, job] : model_jobs_) {
    if (job.deadline_ms != 0 && now_ms >= job.deadline_ms) CancelModelJob(ordinal, now_ms);
  }
}

void ClusterState::CancelModelJobsOf(uint64_t session_id, int64_t now_ms) {
  for (const auto& [ordinal, job] : model_jobs_) {
    if (job.session_id == session_id) CancelModelJob(ordinal, now_ms);
  }
}

void ClusterState::FailModelJobsOf(uint64_t session_id, const absl::Status& status) {
  for (auto& [ordinal, job] : model_jobs_) {
    if (job.session_id == session_id) Respond(std::exchange(job.request, 0), status);
  }
  if (const auto it = recording_jobs_.find(session_id); it != recording_jobs_.end()) {
    Respond(std::exchange(it->second.first.request, 0), status);
  }
}

}  // namespace eduba
