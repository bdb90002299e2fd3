#include "model/job_loop.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/digest.h"

namespace eduba {

JobLoop::~JobLoop() {
  for (auto& [id, job] : jobs_) TakeBackHalfAStep(job);
}

absl::Status JobLoop::Open(uint64_t session_id, const ContextOptions& options, const Placement& placement,
                           int index) {
  if (!options_.content->Holds(session_id, options, placement)) EndJobsOf(session_id);
  return options_.content->Open(session_id, options, placement, index);
}

void JobLoop::Close(uint64_t session_id) {
  EndJobsOf(session_id);
  options_.content->Close(session_id);
}

void JobLoop::Retain(const std::set<uint64_t>& session_ids) {
  std::set<uint64_t> gone;
  for (const auto& [id, job] : jobs_) gone.insert(job.id.session_id);
  for (const uint64_t session_id : gone) {
    if (session_ids.count(session_id) == 0) EndJobsOf(session_id);
  }
  options_.content->Retain(session_ids);
}

absl::Status JobLoop::Fork(uint64_t session_id, uint64_t fork_id) {
  if (IsBeingReadAgain(session_id, std::numeric_limits<uint64_t>::max())) {
    return absl::UnavailableError(
        absl::StrCat("session ", session_id, " is being read again after an interruption; fork it later"));
  }
  return options_.content->Fork(session_id, fork_id);
}

bool JobLoop::IsBeingReadAgain(uint64_t session_id, uint64_t before_job) const {
  return std::any_of(jobs_.begin(), jobs_.lower_bound(before_job), [&](const auto& entry) {
    const RunningJob& job = entry.second;
    return job.id.session_id == session_id && (job.kind == Kind::kReadAgain || job.waiting);
  });
}

absl::Status JobLoop::Start(const JobId& id, JobRequest request) {
  RunningJob job;
  job.id = id;
  EDUBA_ASSIGN_OR_RETURN(job.session, options_.content->Find(id.session_id));
  job.context = &job.session->context;
  if (IsBeingReadAgain(id.session_id, id.id)) {
    job.waiting = std::move(request);
  } else {
    EDUBA_RETURN_IF_ERROR(Begin(request, job));
  }
  RunningJob& started = jobs_.emplace(id.id, std::move(job)).first->second;
  if (started.fork) started.context = &*started.fork;
  if (IsComplete(started)) Finish(started, {});
  return absl::OkStatus();
}

void JobLoop::BeginWaitingJobs() {
  for (auto next = jobs_.begin(); next != jobs_.end();) {
    RunningJob& job = next++->second;
    if (!job.waiting || IsBeingReadAgain(job.id.session_id, job.id.id)) continue;
    JobRequest request = *std::exchange(job.waiting, std::nullopt);
    const absl::Status status = Begin(request, job);
    if (job.fork) job.context = &*job.fork;
    if (!status.ok() || IsComplete(job)) Finish(job, {status});
  }
}

absl::Status JobLoop::Begin(JobRequest& request, RunningJob& job) {
  const bool settles = std::holds_alternative<SettleJob>(request);
  if (!settles && !job.session->is_read()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "session ", job.id.session_id, " was interrupted, and only ", job.session->context.length(),
        " of its ", job.session->ids.size(), " tokens could be read again; delete it"));
  }
  return std::visit([&](auto& some) { return Begin(some, job); }, request);
}

absl::Status JobLoop::CheckIds(absl::Span<const int32_t> ids) const {
  if (ids.empty()) return absl::InvalidArgumentError("there are no token ids, wanted at least one");
  const int64_t vocab = engine().model().config().vocab_size;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", i, " is ", ids[i], ", wanted 0 to ", vocab - 1));
    }
  }
  return absl::OkStatus();
}

absl::Status JobLoop::Begin(AppendJob& request, RunningJob& job) {
  EDUBA_RETURN_IF_ERROR(CheckIds(request.ids));
  const int64_t length = job.session->ids.size();
  if (request.at < 0 || request.at > length) {
    return absl::OutOfRangeError(absl::StrCat("append at position ", request.at, " of session ",
                                              job.id.session_id, ", which is ", length, " tokens long"));
  }
  std::vector<int32_t> stored(std::min(length - request.at, static_cast<int64_t>(request.ids.size())));
  if (absl::Status status = job.session->ids.Read(request.at, absl::MakeSpan(stored)); !status.ok()) {
    // The other ranks may have read theirs, and would go on without this one.
    options_.group->Abort(status);
    return status;
  }
  const auto differs = std::mismatch(stored.begin(), stored.end(), request.ids.begin());
  if (differs.first != stored.end()) {
    return absl::AlreadyExistsError(absl::StrCat("position ", request.at + (differs.first - stored.begin()),
                                                 " holds token ", *differs.first, " already, not ",
                                                 *differs.second, "; nothing was read"));
  }
  job.kind = Kind::kAppend;
  job.already_stored = static_cast<int64_t>(stored.size());
  job.ids.assign(request.ids.begin() + job.already_stored, request.ids.end());
  return absl::OkStatus();
}

absl::Status JobLoop::Begin(GenerateJob& request, RunningJob& job) {
  if (job.context->length() == 0) {
    return absl::FailedPreconditionError("the session is empty; append a prompt before generating");
  }
  if (request.owner_rank) {
    const int owner = *request.owner_rank;
    const bool windowed = job.context->every_layer_sees_a_window();
    if (owner < 0 || owner >= options_.group->size() || !windowed) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", owner, " cannot generate alone: the group has ", options_.group->size(),
                       " ranks", windowed ? "" : ", and some layers see keys of all of them"));
    }
  }
  EDUBA_RETURN_IF_ERROR(CheckSampling(request.sampling));
  if (request.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens is ", request.max_tokens, ", wanted at least 1"));
  }
  if (options_.tokenizer != nullptr) {
    job.text_stream = options_.tokenizer->NewTextStream({});
  } else if (!request.stop_strings.empty()) {
    return absl::FailedPreconditionError(
        "stop strings need a tokenizer, and the model's folder has none; use stop ids");
  }
  job.kind = Kind::kGenerate;
  job.generate = std::move(request);
  WantSinkMass(job.generate.sink_mass, job);
  return absl::OkStatus();
}

absl::Status JobLoop::Begin(ScoreJob& request, RunningJob& job) {
  if (job.context->length() == 0) {
    return absl::FailedPreconditionError(
        "the session is empty: the first token of a context has no probability; append one before");
  }
  EDUBA_RETURN_IF_ERROR(CheckIds(request.ids));
  job.kind = Kind::kScore;
  job.ids = std::move(request.ids);
  job.fork = job.session->context.Fork();
  WantSinkMass(request.sink_mass, job);
  return absl::OkStatus();
}

absl::Status JobLoop::Begin(EmbedJob& request, RunningJob& job) {
  EDUBA_RETURN_IF_ERROR(Pooler::CheckRanges(request.ranges));
  const int64_t end = request.ranges.empty() ? 0 : request.ranges.back().end;
  if (end < 1 || end > job.context->length()) {
    return absl::OutOfRangeError(absl::StrCat("the last range ends at ", end, ", the session has ",
                                              job.context->length(), " positions"));
  }
  job.fork = job.context->Fork();
  job.fork->Clear();
  job.kind = Kind::kEmbed;
  job.embed = std::move(request);
  job.needs_memory = true;
  // A chunk first: where this rank has no memory, only the ranks that have it would know how to begin a
  // prefill.
  job.in_chunks_until = 1;
  job.ids = {0};  // An entry's that will not be computed, while there is no memory.
  return absl::OkStatus();
}

absl::Status JobLoop::Begin(SettleJob& request, RunningJob& job) {
  for (const auto& [id, other] : jobs_) {
    if (id != job.id.id && other.id.session_id == job.id.session_id && !other.waiting) {
      return absl::FailedPreconditionError(
          absl::StrCat("session ", job.id.session_id, " is to be settled, and a job of it is under way"));
    }
  }
  absl::Status status = options_.content->BeginSettle(job.id.session_id, request.length, request.read_again);
  if (!status.ok()) {
    // The other ranks' disks may have given and taken what this one's did not.
    if (absl::IsUnavailable(status) || absl::IsResourceExhausted(status)) options_.group->Abort(status);
    return status;
  }
  job.kind = Kind::kReadAgain;
  if (job.session->is_read()) return absl::OkStatus();
  job.needs_memory = true;
  job.in_chunks_until = 1;  // These three as for an embedding.
  job.ids = {0};
  return absl::OkStatus();
}

bool JobLoop::IsComplete(const RunningJob& job) {
  return !job.waiting && job.kind != Kind::kGenerate && job.done == static_cast<int64_t>(job.ids.size());
}

void JobLoop::WantSinkMass(bool wanted, RunningJob& job) const {
  const ModelConfig& config = engine().model().config();
  if (wanted) job.sink_mass.assign(config.layers.size() * config.query_heads, 0);
}

void JobLoop::Cancel(uint64_t id) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) return;
  RunningJob& job = found->second;
  if (job.generate.owner_rank) {
    job.cancelled = true;
  } else {
    Finish(job, {absl::OkStatus(), FinishReason::kNone, /*cancelled=*/true});
  }
}

void JobLoop::EndJobsOf(uint64_t session_id) {
  for (auto next = jobs_.begin(); next != jobs_.end();) {
    RunningJob& job = next++->second;
    if (job.id.session_id != session_id) continue;
    job.done = 0;  // Nothing is left of it; and what an owner rank has done, the others need not know yet.
    job.already_stored = 0;
    Finish(job, {absl::NotFoundError("the session was deleted")});
  }
}

void JobLoop::FailAll(const absl::Status& status) {
  for (auto& [id, job] : jobs_) TakeBackHalfAStep(job);
  while (!jobs_.empty()) Finish(jobs_.begin()->second, {status});
}

void JobLoop::TakeBackHalfAStep(RunningJob& job) {
  job.prefill.reset();
  engine().ReleaseReservation(*job.context);
  if (job.rows_skipped == 0) return;
  if (job.rows_skipped == 1) {
    if (job.done == 1) engine().UnskipRow(*job.context);
  } else {
    job.context->Clear();  // Pages may be gone that rows at the old end see.
  }
  job.done = 0;
  job.rows_skipped = 0;
}

void JobLoop::End(RunningJob& job, JobEnd end) {
  if (job.generate.owner_rank) {
    job.ended = std::move(end);
  } else {
    Finish(job, end);
  }
}

void JobLoop::Finish(RunningJob& job, const JobEnd& end) {
  JobResult result;
  result.status = end.status;
  result.finish_reason = end.reason;
  result.cancelled = end.cancelled;
  result.done = job.already_stored + job.done;
  result.already_stored = job.already_stored;
  result.length = job.context->length();
  uint64_t digest = HashInto(0, job.context->last());
  digest = HashInto(digest, absl::MakeConstSpan(job.log_probs));
  digest = HashInto(digest, absl::MakeConstSpan(job.sink_mass));
  if (end.status.ok() && !end.cancelled && job.pooler) {
    absl::StatusOr<std::vector<float>> vectors = job.pooler->Finish();
    result.status = vectors.status();
    if (vectors.ok()) {
      digest = HashInto(digest, absl::MakeConstSpan(*vectors));
      if (Reports(job)) result.vectors = *std::move(vectors);
    }
  }
  if (Computes(job)) result.digest = digest;
  if (Reports(job)) {
    result.log_probs = std::move(job.log_probs);
    const auto rows = static_cast<double>(std::max<int64_t>(1, job.done));
    for (const int64_t sum : job.sink_mass) {
      result.sink_mass.push_back(static_cast<float>(static_cast<double>(sum) * kSinkMassUnit / rows));
    }
  }
  const uint64_t id = job.id.id;
  jobs_.erase(id);
  options_.listener->OnResult(id, result);
}

void JobLoop::ReportProgress(const RunningJob& job, const JobProgress& progress) const {
  if (Reports(job)) options_.listener->OnProgress(job.id.id, progress);
}

}  // namespace eduba
