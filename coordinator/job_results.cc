// Jobs: what comes of them.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/jobs.h"

namespace eduba {
namespace {

std::string Outcome(const v1::CommandResult& result) {
  const auto code = static_cast<absl::StatusCode>(result.code());
  return result.code() == 0 ? "OK"
                            : absl::StrCat(absl::StatusCodeToString(code), " (", result.message(), ")");
}

}  // namespace

void Jobs::OnProgress(int rank, v1::ModelProgress progress, int64_t now_ms) {
  const auto it = jobs_.find(progress.ordinal());
  if (it == jobs_.end()) return;
  Job& job = it->second;
  if (rank != job.reporting_rank()) {
    return group_->Expel(rank, "told of a job that is another worker's to tell of", now_ms);
  }
  if (progress.has_tokens() && job.kind == Job::Kind::kGenerate) {
    const size_t bytes = progress.tokens().ids().size();
    if (bytes == 0 || bytes % sizeof(int32_t) != 0 || progress.tokens().log_probs().size() != bytes) {
      return group_->Expel(rank, "sent tokens of wrong sizes", now_ms);
    }
    job.tokens += static_cast<int64_t>(bytes / sizeof(int32_t));
    if (job.request != 0) outbox_->Emit(Generated{job.request, std::move(*progress.mutable_tokens())});
  }
  if (progress.has_embeddings() && job.kind == Job::Kind::kEmbed) {
    const v1::EmbedResponse& rows = progress.embeddings();
    const auto wanted = static_cast<size_t>(rows.count()) * group_->model()->hidden_size() * sizeof(float);
    if (rows.first_range() != job.embedded || rows.count() < 1 || rows.vectors().size() != wanted) {
      return group_->Expel(rank, "sent embeddings of wrong sizes", now_ms);
    }
    job.embedded += rows.count();
    if (job.request != 0) outbox_->Emit(Embedded{job.request, std::move(*progress.mutable_embeddings())});
  }
}

std::string Jobs::Difference(const Job& job, const Answered& answered) const {
  const v1::CommandResult& told = answered.results[job.reporting_rank()];
  const std::string reporting = absl::StrCat("worker ", job.reporting_rank());
  for (size_t rank = 0; rank < answered.results.size(); ++rank) {
    const v1::CommandResult& result = answered.results[rank];
    const std::string name = group_->NameOf(static_cast<int>(rank));
    if (result.code() != told.code()) {
      return absl::StrCat(name, " ended with ", Outcome(result), ", and ", reporting, " with ",
                          Outcome(told));
    }
    if (result.model().done() != told.model().done()) {
      return absl::StrCat(name, " did ", result.model().done(), " tokens, and ", reporting, " ",
                          told.model().done());
    }
    if (job.extends() && result.model().length() != told.model().length()) {
      return absl::StrCat(name, " has ", result.model().length(), " tokens, and ", reporting, " ",
                          told.model().length());
    }
    // Ranks beside an owner rank have no bits of their own.
    if (!job.owner_rank && result.model().digest() != told.model().digest()) {
      return absl::StrCat(name, " computed other bits than ", reporting);
    }
  }
  return "";
}

std::string Jobs::Nonsense(const Job& job, const SessionEntry& session, const v1::CommandResult& told) const {
  const v1::ModelResult& model = told.model();
  if (job.extends() && told.has_model()) {
    const int64_t before = session.record.length();
    const bool append = job.kind == Job::Kind::kAppend;
    const int64_t most = append ? std::max(before, job.sent_at + job.tokens) : before + job.tokens;
    const int64_t least = append && (told.code() != 0 || model.cancelled()) ? before : most;
    if (model.done() < 0 || model.done() > job.tokens || model.length() < least || model.length() > most) {
      return absl::StrCat("answered that ", model.done(), " of ", job.tokens,
                          " tokens are read, and the session has ", model.length(), ", wanted ", least,
                          " to ", most);
    }
  }
  if (told.code() != 0) return "";
  if (job.extends() && !told.has_model()) return "answered without a result";
  const int64_t mass_bytes = int64_t{4} * session.spec->layers() * session.spec->query_heads();
  if (static_cast<int64_t>(model.sink_mass().size()) != (job.sink_mass ? mass_bytes : 0)) {
    return "answered sink mass of a wrong size";
  }
  if (job.kind == Job::Kind::kScore &&
      static_cast<int64_t>(model.log_probs().size()) != job.tokens * static_cast<int64_t>(sizeof(float))) {
    return "answered log-probabilities of a wrong size";
  }
  if (job.kind == Job::Kind::kEmbed && job.embedded != job.ranges) {
    return absl::StrCat("embedded ", job.embedded, " of ", job.ranges, " ranges");
  }
  return "";
}

void Jobs::OnEnded(const Answered& answered, int64_t now_ms) {
  const auto node = jobs_.extract(answered.ordinal);
  Job job = node.mapped();
  const std::string differs = Difference(job, answered);
  if (!differs.empty()) {
    outbox_->Respond(job.request,
                     absl::InternalError(absl::StrCat(
                         differs, "; this is a fault of the machine or of Eduba: the group starts anew")));
    return group_->End(differs, now_ms);
  }
  SessionEntry* session = sessions_->ById(job.session_id);
  // Deleted meanwhile; its calls have been told.
  if (session == nullptr || session->phase == SessionEntry::Phase::kClosing) {
    extended_.erase(job.session_id);
    return;
  }
  const v1::CommandResult& told = answered.results[job.reporting_rank()];
  const std::string nonsense = Nonsense(job, *session, told);
  if (!nonsense.empty()) {
    outbox_->Respond(job.request, absl::InternalError(absl::StrCat(
                                      "worker ", job.reporting_rank(),
                                      " gave an answer that makes no sense: the group starts anew; retry")));
    return group_->Expel(job.reporting_rank(), nonsense, now_ms);
  }
  if (job.extends() && told.has_model()) job.read = told.model().length() - session->record.length();
  if (job.read > 0) {
    // Borders of appends mean nothing where the ids themselves are compared.
    session->record.appends = {{0, session->record.length() + job.read, {}}};
    if (session->phase == SessionEntry::Phase::kReady) return Record(job, session, told);
  }
  if (job.extends()) extended_.erase(job.session_id);
  Reply(job, *session, told, now_ms);
}

// Written down before the client hears of it, as for other appends: what it was told of is never forgotten
// silently. What an earlier write could not store is stored with it.
void Jobs::Record(Job job, SessionEntry* session, v1::CommandResult told) {
  const uint64_t id = session->record.id;
  const int64_t length = session->record.length();
  recording_[id] = {job, std::move(told)};
  journal_->Write(
      AppendCommitted{id, {session->recorded, length - session->recorded, {}}},
      [this, id, length](const absl::Status& status, int64_t now) { OnRecorded(id, length, status, now); });
}

void Jobs::OnRecorded(uint64_t session_id, int64_t length, const absl::Status& status, int64_t now_ms) {
  const auto node = recording_.extract(session_id);
  const auto& [job, told] = node.mapped();
  extended_.erase(session_id);
  SessionEntry* session = sessions_->ById(session_id);
  if (session == nullptr) return;
  if (status.ok()) {
    session->recorded = length;
    return Reply(job, *session, told, now_ms);
  }
  outbox_->Respond(
      job.request,
      absl::Status(status.code(),
                   absl::StrCat("session '", session->record.name, "' has ", session->record.length(),
                                " tokens now, but they are not on record: ", std::string(status.message()))));
}

absl::Status Jobs::FailureOf(const Job& job, const SessionEntry& session,
                             const v1::CommandResult& told) const {
  const auto code = static_cast<absl::StatusCode>(told.code());
  const std::string& name = session.record.name;
  if (job.kind == Job::Kind::kAppend && code == absl::StatusCode::kAlreadyExists) {
    return absl::Status(code, absl::StrCat("append to session '", name, "': ", told.message()));
  }
  std::string how_far;
  if (job.extends()) {
    how_far = absl::StrCat("; ", job.read, " tokens of it are in the session, which has ",
                           session.record.length(), " now");
  }
  return absl::Status(code, absl::StrCat("session '", name, "': ", told.message(), how_far));
}

void Jobs::Reply(const Job& job, const SessionEntry& session, const v1::CommandResult& told, int64_t now_ms) {
  if (told.code() != 0) return outbox_->Respond(job.request, FailureOf(job, session, told));
  const int64_t length = session.record.length();
  switch (job.kind) {
    case Job::Kind::kAppend: {
      v1::AppendTokensReceipt receipt;
      receipt.set_at(job.at);
      receipt.set_count(job.count);
      receipt.set_length(length);
      receipt.set_already_stored(job.already_stored);
      return outbox_->Respond(job.request, Answer(receipt));
    }
    case Job::Kind::kGenerate: {
      v1::GenerateSummary summary;
      summary.set_tokens(job.tokens);
      summary.set_length(length);
      summary.set_finish_reason(told.model().cancelled() ? v1::FINISH_REASON_DEADLINE
                                                         : told.model().finish_reason());
      summary.set_seconds(static_cast<double>(now_ms - job.started_ms) / 1000);
      summary.set_sink_mass(told.model().sink_mass());
      return outbox_->Respond(job.request, Answer(summary));
    }
    case Job::Kind::kScore: {
      v1::ScoreResponse response;
      response.set_log_probs(told.model().log_probs());
      response.set_sink_mass(told.model().sink_mass());
      return outbox_->Respond(job.request, Answer(std::move(response)));
    }
    case Job::Kind::kEmbed:
      return outbox_->Respond(job.request, Answer(Done{}));
  }
}

}  // namespace eduba
