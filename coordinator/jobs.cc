// Jobs: calls become commands. How they end is in job_results.cc.
#include "coordinator/jobs.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

absl::Status CheckIds(const std::vector<int32_t>& ids, int64_t vocab, const std::string& what) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": id ", i, " is ", ids[i], ", wanted 0 to ", vocab - 1));
    }
  }
  return absl::OkStatus();
}

// Whether there is something to go on after, the session's own sinks included.
absl::Status CheckNotEmpty(const SessionEntry& session, const std::string& what) {
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

// How many of the session's own sink tokens are still to be read. They count as being there.
int64_t MissingSinks(const SessionEntry& session) {
  return std::max<int64_t>(0, DedicatedSinks(*session.spec) - session.record.length());
}

// The ids that the workers get for the client's `ids` at `at`: sinks that are still to be read come between
// those that are there and those that are new.
std::vector<int32_t> WithSinks(const SessionEntry& session, int64_t at, const std::vector<int32_t>& ids) {
  const int64_t length = session.record.length();
  const int64_t sinks = MissingSinks(session);
  const auto count = static_cast<int64_t>(ids.size());
  if (sinks == 0 || at + count < length) return ids;
  const int64_t there = std::max<int64_t>(0, length - at);
  const int64_t next = std::min(count, length + sinks - at);
  std::vector<int32_t> sent(ids.begin(), ids.begin() + there);
  sent.insert(sent.end(), sinks, session.spec->model().sink_token());
  sent.insert(sent.end(), ids.begin() + next, ids.end());
  return sent;
}

// Whether ranges are ascending pairs [begin, end) inside the session.
absl::Status CheckRanges(const std::vector<int64_t>& bounds, int64_t length, const std::string& of) {
  int64_t end = 0;
  for (size_t i = 0; i < bounds.size(); i += 2) {
    if (i + 1 == bounds.size() || bounds[i] < end || bounds[i + 1] <= bounds[i]) {
      return absl::InvalidArgumentError(absl::StrCat(
          of, ": range ", i / 2,
          " is empty, or does not begin after the one before it; wanted ascending pairs of positions "
          "[begin, end)"));
    }
    end = bounds[i + 1];
    if (end > length) {
      return absl::OutOfRangeError(
          absl::StrCat(of, ": range ", i / 2, " ends at ", end, ", but the session has ", length, " tokens"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SessionEntry*> Jobs::FindIdle(const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(SessionEntry * session, sessions_->FindModel(name));
  if (extended_.count(session->record.id) > 0) {
    return absl::AbortedError(absl::StrCat("session '", name,
                                           "' is being extended by another append or generation: retry when "
                                           "it has ended"));
  }
  return session;
}

void Jobs::Start(Job job, v1::Command command, int64_t now_ms) {
  job.started_ms = now_ms;
  if (job.extends()) extended_.insert(job.session_id);
  const auto message = group_->Send(
      std::move(command), now_ms, [this](const Answered& answered, int64_t now) { OnEnded(answered, now); });
  jobs_.emplace(message->command().ordinal(), job);
}

absl::Status Jobs::CheckAppend(const SessionEntry& session, int64_t at,
                               const std::vector<int32_t>& ids) const {
  const std::string to = absl::StrCat("append to session '", session.record.name, "'");
  const int64_t length = session.record.length() + MissingSinks(session);
  const auto count = static_cast<int64_t>(ids.size());
  if (count < 1 || count > kTokenIdsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(to, ": a message of ", count, " token ids, wanted 1 to ", kTokenIdsMax));
  }
  if (at < 0) return absl::InvalidArgumentError(absl::StrCat(to, ": at is ", at, ", wanted 0 or more"));
  if (at > length) {
    return absl::OutOfRangeError(absl::StrCat(to, ": it starts at ", at, ", but the session has ", length,
                                              " tokens: a gap is not allowed, append at ", length));
  }
  if (count > kMaxPositions - at) {
    return absl::OutOfRangeError(
        absl::StrCat(to, ": ", count, " tokens at ", at, " would pass the limit of ", kMaxPositions));
  }
  EDUBA_RETURN_IF_ERROR(CheckIds(ids, group_->model()->vocab_size(), to));
  const int32_t sink = session.spec->model().sink_token();
  for (int64_t p = std::max(at, session.record.length()); p < std::min(length, at + count); ++p) {
    if (ids[p - at] == sink) continue;
    return absl::AlreadyExistsError(
        absl::StrCat(to, ": position ", p, " holds the sink token ", sink, " already, not ", ids[p - at]));
  }
  return absl::OkStatus();
}

void Jobs::Append(RequestId request, const std::string& name, std::optional<int64_t> given_at,
                  std::vector<int32_t> ids, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindIdle(name);
  if (!found.ok()) return outbox_->Respond(request, found.status());
  const SessionEntry& session = **found;
  const int64_t length = session.record.length() + MissingSinks(session);
  const int64_t at = given_at.value_or(length);
  const absl::Status status = CheckAppend(session, at, ids);
  if (!status.ok()) return outbox_->Respond(request, status);

  Job job;
  job.kind = Job::Kind::kAppend;
  job.request = request;
  job.session_id = session.record.id;
  job.at = at;
  job.count = static_cast<int64_t>(ids.size());
  job.already_stored = std::min(job.count, length - at);
  job.sent_at = std::min(at, session.record.length());
  const std::vector<int32_t> sent = WithSinks(session, at, ids);
  job.tokens = static_cast<int64_t>(sent.size());
  v1::Command command;
  command.mutable_model_append()->set_session_id(session.record.id);
  command.mutable_model_append()->set_ids(sent.data(), sent.size() * sizeof(int32_t));
  command.mutable_model_append()->set_at(job.sent_at);
  Start(job, std::move(command), now_ms);
}

absl::Status Jobs::CheckSinkMass(bool wanted, const std::string& what) const {
  const v1::Model& model = *group_->model();
  const int64_t heads = int64_t{model.layer_windows_size()} * model.query_heads();
  if (!wanted || heads <= kSinkMassHeadsMax) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": the model has ", heads,
                                                 " heads in all its layers; sink mass is told for at most ",
                                                 kSinkMassHeadsMax));
}

std::optional<int> Jobs::OwnerRankFor(const SessionEntry& session) const {
  if (!EveryLayerSeesAWindow(*session.spec, *group_->model())) return std::nullopt;
  std::vector<int> generations(group_->size(), 0);
  for (const auto& [ordinal, job] : jobs_) {
    if (job.owner_rank) ++generations[*job.owner_rank];
  }
  return static_cast<int>(std::min_element(generations.begin(), generations.end()) - generations.begin());
}

void Jobs::Generate(RequestId request, const v1::GenerateRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindIdle(args.session());
  if (!found.ok()) return outbox_->Respond(request, found.status());
  const SessionEntry& session = **found;
  absl::Status status = CheckGenerateRequest(args, *group_->model());
  const int64_t length = session.record.length();
  const std::string from = absl::StrCat("generation from session '", args.session(), "'");
  if (status.ok()) status = CheckNotEmpty(session, from);
  if (status.ok()) status = CheckSinkMass(args.sink_mass(), from);
  if (status.ok() && args.max_tokens() > kMaxPositions - length) {
    status = absl::OutOfRangeError(absl::StrCat(from, ": ", args.max_tokens(), " tokens after ", length,
                                                " would pass the limit of ", kMaxPositions));
  }
  if (!status.ok()) return outbox_->Respond(request, status);

  Job job;
  job.kind = Job::Kind::kGenerate;
  job.request = request;
  job.session_id = session.record.id;
  job.sink_mass = args.sink_mass();
  job.owner_rank = OwnerRankFor(session);
  if (args.time_limit_ms() > 0) {
    job.deadline_ms = now_ms + std::min(args.time_limit_ms(), std::numeric_limits<int64_t>::max() - now_ms);
  }
  v1::Command command;
  command.mutable_model_generate()->set_session_id(session.record.id);
  *command.mutable_model_generate()->mutable_request() = args;
  if (job.owner_rank) command.mutable_model_generate()->set_owner_rank(*job.owner_rank);
  Start(job, std::move(command), now_ms);
}

void Jobs::Score(RequestId request, const v1::ScoreRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindIdle(args.session());
  if (!found.ok()) return outbox_->Respond(request, found.status());
  const std::string of = absl::StrCat("score on session '", args.session(), "'");
  const auto ids =
      NumbersOf<int32_t>(args.ids(), absl::StrCat(of, ": ids"), 1, kPayloadBytesMax / sizeof(int32_t));
  absl::Status status = ids.status();
  if (status.ok()) status = CheckIds(*ids, group_->model()->vocab_size(), of);
  if (status.ok()) status = CheckNotEmpty(**found, of);
  if (status.ok()) status = CheckSinkMass(args.sink_mass(), of);
  if (!status.ok()) return outbox_->Respond(request, status);

  Job job;
  job.kind = Job::Kind::kScore;
  job.request = request;
  job.session_id = (*found)->record.id;
  job.tokens = static_cast<int64_t>(ids->size());
  job.sink_mass = args.sink_mass();
  v1::Command command;
  command.mutable_model_score()->set_session_id(job.session_id);
  command.mutable_model_score()->set_ids(args.ids());
  command.mutable_model_score()->set_sink_mass(args.sink_mass());
  Start(job, std::move(command), now_ms);
}

void Jobs::Embed(RequestId request, const v1::EmbedRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindIdle(args.session());
  if (!found.ok()) return outbox_->Respond(request, found.status());
  const std::string of = absl::StrCat("embedding of session '", args.session(), "'");
  const auto bounds =
      NumbersOf<int64_t>(args.ranges(), absl::StrCat(of, ": ranges"), 1, kPayloadBytesMax / sizeof(int64_t));
  absl::Status status = bounds.status();
  if (status.ok()) status = CheckRanges(*bounds, (*found)->record.length(), of);
  if (status.ok() && !v1::Pool_IsValid(args.pool())) {
    status = absl::InvalidArgumentError(absl::StrCat(of, ": the pool is not known"));
  }
  if (!status.ok()) return outbox_->Respond(request, status);

  Job job;
  job.kind = Job::Kind::kEmbed;
  job.request = request;
  job.session_id = (*found)->record.id;
  job.ranges = static_cast<int64_t>(bounds->size() / 2);
  v1::Command command;
  command.mutable_model_embed()->set_session_id(job.session_id);
  command.mutable_model_embed()->set_ranges(args.ranges());
  command.mutable_model_embed()->set_pool(args.pool());
  Start(job, std::move(command), now_ms);
}

// ---- Cancelling

bool Jobs::Cancel(RequestId request, int64_t now_ms) {
  for (auto& [ordinal, job] : jobs_) {
    if (job.request != request) continue;
    job.request = 0;
    CancelJob(ordinal, now_ms);
    return true;
  }
  for (auto& [session_id, recording] : recording_) {
    if (recording.job.request != request) continue;
    recording.job.request = 0;
    return true;
  }
  return false;
}

void Jobs::CancelJob(uint64_t ordinal, int64_t now_ms) {
  if (std::exchange(jobs_.at(ordinal).cancelled, true)) return;
  v1::Command command;
  command.mutable_cancel_job()->set_ordinal(ordinal);
  group_->Send(std::move(command), now_ms);
}

void Jobs::Tick(int64_t now_ms) {
  for (const auto& [ordinal, job] : jobs_) {
    if (job.deadline_ms != 0 && now_ms >= job.deadline_ms) CancelJob(ordinal, now_ms);
  }
}

void Jobs::CancelOf(uint64_t session_id, int64_t now_ms) {
  for (const auto& [ordinal, job] : jobs_) {
    if (job.session_id == session_id) CancelJob(ordinal, now_ms);
  }
}

void Jobs::FailOf(uint64_t session_id, const absl::Status& status) {
  for (auto& [ordinal, job] : jobs_) {
    if (job.session_id == session_id) outbox_->Respond(std::exchange(job.request, 0), status);
  }
  if (const auto it = recording_.find(session_id); it != recording_.end()) {
    outbox_->Respond(std::exchange(it->second.job.request, 0), status);
  }
}

void Jobs::OnOver(const absl::Status& status) {
  for (const auto& [ordinal, job] : std::exchange(jobs_, {})) outbox_->Respond(job.request, status);
  extended_.clear();
  for (const auto& [session_id, recording] : recording_) extended_.insert(session_id);
}

}  // namespace eduba
