// One step of the job loop (model/job_loop.h), in the order of its parts.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/job_loop.h"
#include "model/log_probs.h"

namespace eduba {
namespace {

// Generations whose logits are held at once.
constexpr int64_t kLogitRows = 32;

constexpr int64_t kStatusCodes = 32;
constexpr int64_t kFinishReasons = 16;

// What a generation's owner rank tells the others of its end, before they have its tokens. 0: it goes on.
struct EndWord {
  absl::StatusCode code = absl::StatusCode::kOk;
  FinishReason reason = FinishReason::kNone;
  int64_t done = 0;  // Its tokens.

  int64_t ToWord() const {
    return 1 + static_cast<int64_t>(code) +
           kStatusCodes * (static_cast<int64_t>(reason) + kFinishReasons * done);
  }
  static EndWord From(int64_t word) {
    const int64_t rest = (word - 1) / kStatusCodes;
    return {static_cast<absl::StatusCode>((word - 1) % kStatusCodes),
            static_cast<FinishReason>(rest % kFinishReasons), rest / kFinishReasons};
  }
};

}  // namespace

absl::StatusOr<uint64_t> JobLoop::Step(uint64_t newest) {
  absl::Duration timeout;
  for (const auto& [id, job] : jobs_) timeout = std::max(timeout, job.id.timeout);
  BeginWaitingJobs();
  std::vector<RunningJob*> jobs = NextJobs();
  ChooseTokens(jobs);
  if (!jobs.empty() && jobs.back()->needs_memory) TakeMemory(*jobs.back());
  StepPlan plan = PlanStep(std::move(jobs));
  const absl::Time deadline = absl::Now() + timeout;
  EDUBA_ASSIGN_OR_RETURN(const uint64_t agreed, AgreeOnStep(newest, deadline, plan));
  StepPlan own;     // The generations that this rank alone computes.
  StepPlan common;  // All other jobs that it computes.
  for (size_t i = 0; i < plan.jobs.size(); ++i) {
    RunningJob& job = *plan.jobs[i];
    if (!Computes(job)) {
      engine().SkipRow(*job.context);
      ++job.rows_skipped;
      ++job.done;
      continue;
    }
    StepPlan& part = job.generate.owner_rank ? own : common;
    part.jobs.push_back(&job);
    part.entries.push_back(plan.entries[i]);
  }
  // Apart, because what fails in a step fails on all ranks that make it.
  EDUBA_RETURN_IF_ERROR(RunEntries(deadline, common.jobs, common.entries));
  EDUBA_RETURN_IF_ERROR(RunEntries(deadline, own.jobs, own.entries));
  if (plan.prefill != nullptr) EDUBA_RETURN_IF_ERROR(RunPrefill(deadline, *plan.prefill));
  return agreed;
}

std::vector<RunningJob*> JobLoop::NextJobs() {
  std::vector<RunningJob*> jobs;
  RunningJob* first_reader = nullptr;
  RunningJob* next_reader = nullptr;
  for (auto& [id, job] : jobs_) {
    if (job.waiting) continue;
    if (job.kind == Kind::kGenerate) {
      jobs.push_back(&job);
      continue;
    }
    if (first_reader == nullptr) first_reader = &job;
    if (next_reader == nullptr && id > last_reader_) next_reader = &job;
  }
  if (next_reader == nullptr) next_reader = first_reader;
  if (next_reader != nullptr) {
    last_reader_ = next_reader->id.id;
    jobs.push_back(next_reader);
  }
  return jobs;
}

void JobLoop::ChooseTokens(std::vector<RunningJob*>& jobs) {
  std::vector<RunningJob*> generating;
  for (RunningJob* job : jobs) {
    const bool goes_on = !job->ended && !job->cancelled;
    if (job->kind == Kind::kGenerate && Computes(*job) && goes_on) generating.push_back(job);
  }
  for (size_t first = 0; first < generating.size(); first += kLogitRows) {
    const absl::Span<RunningJob* const> some = absl::MakeConstSpan(generating).subspan(first, kLogitRows);
    if (ChooseTokens(some).ok()) continue;
    for (RunningJob* job : some) {
      const absl::Status status = ChooseTokens({job});
      if (status.ok()) continue;
      // One with an owner rank stays among them until the others know.
      if (!job->generate.owner_rank) jobs.erase(std::find(jobs.begin(), jobs.end(), job));
      End(*job, {status});
    }
  }
}

absl::Status JobLoop::ChooseTokens(absl::Span<RunningJob* const> jobs) const {
  std::vector<float> hidden;
  for (const RunningJob* job : jobs) {
    hidden.insert(hidden.end(), job->context->last().begin(), job->context->last().end());
  }
  EDUBA_ASSIGN_OR_RETURN(const std::vector<float> logits, engine().Logits(hidden));
  const auto vocab = static_cast<int64_t>(logits.size() / jobs.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const auto own = absl::MakeConstSpan(logits).subspan(static_cast<int64_t>(i) * vocab, vocab);
    jobs[i]->chosen = ChooseToken(own, jobs[i]->generate.sampling, jobs[i]->context->length());
  }
  return absl::OkStatus();
}

void JobLoop::TakeMemory(RunningJob& job) {
  // Ids; and for every range that is pooled, a word and a float of each channel, and a count.
  const int64_t begin = job.context->length();
  const int64_t end = job.kind == Kind::kEmbed ? job.embed.ranges.back().end : job.session->ids.size();
  const int64_t width = engine().model().config().hidden_size;
  const auto ranges = static_cast<int64_t>(job.embed.ranges.size());
  auto memory = engine().options().store->ReserveBytes(4 * (end - begin) + ranges * (12 * width + 8));
  job.no_memory = memory.status();
  if (!memory.ok()) return;
  std::vector<int32_t> ids(end - begin);
  job.no_memory = job.session->ids.Read(begin, absl::MakeSpan(ids));
  if (!job.no_memory.ok()) return;
  job.memory = *std::move(memory);
  job.ids = std::move(ids);
  job.needs_memory = false;
  if (job.kind != Kind::kEmbed) return;
  job.pooler = Pooler::Create(job.embed.ranges, job.embed.pool, engine().model().hidden_exponents()).value();
}

JobLoop::StepPlan JobLoop::PlanStep(std::vector<RunningJob*> jobs) {
  StepPlan plan;
  if (!jobs.empty() && GoesByPrefill(*jobs.back(), plan.room)) {  // The one that reads comes last.
    plan.prefill = jobs.back();
    jobs.pop_back();
  }
  plan.jobs = std::move(jobs);
  plan.entries.reserve(plan.jobs.size());
  for (RunningJob* job : plan.jobs) plan.entries.push_back(MakeEntry(*job));
  return plan;
}

BatchEntry JobLoop::IdsLeft(RunningJob& job) {
  BatchEntry left{job.context, absl::MakeConstSpan(job.ids).subspan(job.done), job.kind == Kind::kScore};
  if (job.kind != Kind::kReadAgain) return left;
  // Up to where generated tokens begin, or end.
  const int64_t at = job.context->length();
  for (const PositionRange& range : job.session->generated) {
    if (range.end <= at) continue;
    left.asks = range.begin <= at;
    left.ids = left.ids.subspan(0, (left.asks ? range.end : range.begin) - at);
    break;
  }
  return left;
}

BatchEntry JobLoop::MakeEntry(RunningJob& job) const {
  if (job.kind == Kind::kGenerate) {
    return {job.context, absl::MakeConstSpan(&job.chosen.id, 1), /*asks=*/true};
  }
  BatchEntry entry = IdsLeft(job);
  entry.ids = entry.ids.first(engine().NextChunk(*job.context, static_cast<int64_t>(entry.ids.size())));
  if (job.kind == Kind::kScore) job.before.assign(job.context->last().begin(), job.context->last().end());
  return entry;
}

bool JobLoop::GoesByPrefill(RunningJob& job, bool& room) {
  // A prefill's rows are spread over the ranks, and nobody gathers their sink mass.
  if (!options_.sequence_parallel || job.kind == Kind::kGenerate || !job.sink_mass.empty()) return false;
  room = true;
  if (job.prefill == nullptr) {
    if (job.done < job.in_chunks_until) return false;
    // One at a time: a prefill holds the hidden states of a stripe.
    for (const auto& [id, other] : jobs_) {
      if (other.prefill != nullptr) return false;
    }
    const BatchEntry left = IdsLeft(job);
    job.prefill = engine().StartPrefill(*job.context, left.ids, left.asks, job.kind == Kind::kScore,
                                        job.pooler ? &*job.pooler : nullptr, *options_.group);
    if (job.prefill == nullptr) {
      job.in_chunks_until = job.done + static_cast<int64_t>(left.ids.size());
      return false;
    }
    room = job.prefill->Reserve().ok() && ReserveTokens(job, std::ssize(left.ids)).ok();
  }
  room = room && job.prefill->status().ok();
  return true;
}

void JobLoop::GiveUpPrefill(RunningJob& job) {
  job.in_chunks_until = job.done + job.prefill->plan().positions.size();
  job.prefill.reset();
}

absl::Status JobLoop::ReserveTokens(const RunningJob& job, int64_t count) const {
  if (job.kind != Kind::kAppend && job.kind != Kind::kGenerate) return absl::OkStatus();
  // Beside an owner rank all tokens of the generation come at its end.
  if (!Computes(job)) count += job.done;
  const absl::Status status = options_.content->Reserve(job.id.session_id, *job.session, count);
  // Whatever the disk says, the ranks agree on who has no room.
  return status.ok() ? status : absl::ResourceExhaustedError(status.message());
}

absl::Status JobLoop::Reserve(const RunningJob& job, const BatchEntry& entry) const {
  EDUBA_RETURN_IF_ERROR(ReserveTokens(job, std::ssize(entry.ids)));
  const absl::Status status = engine().Prepare(entry);
  // A rank whose device is broken is not one without memory, and cannot go on with the others.
  if (!status.ok() && !absl::IsResourceExhausted(status) && !absl::IsOutOfRange(status)) {
    options_.group->Abort(status);
  }
  return status;
}

absl::StatusOr<uint64_t> JobLoop::AgreeOnStep(uint64_t newest, absl::Time deadline, StepPlan& plan) {
  // Rank 0's newest command; for every entry the ranks without memory for it, and how it ended on its owner
  // rank; the ranks without room for the prefill.
  const size_t count = plan.entries.size();
  std::vector<int64_t> words(1 + 2 * count + (plan.prefill != nullptr ? 1 : 0), 0);
  const auto lacks = [&](size_t i) -> int64_t& { return words[1 + 2 * i]; };
  const auto end_word = [&](size_t i) -> int64_t& { return words[2 + 2 * i]; };
  if (rank() == 0) words[0] = static_cast<int64_t>(newest);
  if (plan.prefill != nullptr && !plan.room) words.back() = 1;
  std::vector<absl::Status> prepared(count);
  for (size_t i = 0; i < count; ++i) {
    const RunningJob& job = *plan.jobs[i];
    if (job.ended) {
      end_word(i) = EndWord{job.ended->status.code(), job.ended->reason, job.done}.ToWord();
    } else if (!job.cancelled) {
      prepared[i] = job.no_memory.ok() ? Reserve(job, plan.entries[i]) : job.no_memory;
      lacks(i) = prepared[i].ok() ? 0 : 1;
    }
  }
  EDUBA_RETURN_IF_ERROR(options_.group->SumI64(absl::MakeSpan(words), deadline));

  const auto is_over = [&](size_t i) { return end_word(i) != 0 || plan.jobs[i]->cancelled; };
  // No memory for the prefill, or numbers that are not finite: chunks need less of the one, and say where the
  // other is. An entry without memory may have it without the prefills, in the next step.
  bool gave_way = plan.prefill != nullptr && words.back() != 0;
  if (gave_way) GiveUpPrefill(*std::exchange(plan.prefill, nullptr));
  bool lacking = false;
  for (size_t i = 0; i < count; ++i) lacking |= lacks(i) > 0 && !is_over(i);
  if (lacking && GiveUpAllPrefills(plan)) gave_way = true;
  for (size_t i = count; i-- > 0;) {
    RunningJob& job = *plan.jobs[i];
    const bool over = is_over(i);
    if (!over && lacks(i) == 0) continue;
    engine().ReleaseReservation(*plan.entries[i].context);
    plan.jobs.erase(plan.jobs.begin() + static_cast<int64_t>(i));
    plan.entries.erase(plan.entries.begin() + static_cast<int64_t>(i));
    if (!over && gave_way) continue;
    JobEnd end;
    if (over) {
      end.cancelled = true;
    } else {
      end.status = prepared[i].ok() ? ModelEngine::NoMemoryElsewhere(lacks(i)) : prepared[i];
    }
    if (job.generate.owner_rank) {
      EDUBA_RETURN_IF_ERROR(EndOnAllRanks(job, end_word(i), std::move(end), deadline));
    } else {
      Finish(job, end);
    }
  }
  return static_cast<uint64_t>(words[0]);
}

bool JobLoop::GiveUpAllPrefills(StepPlan& plan) {
  bool any = false;
  for (auto& [id, job] : jobs_) {
    if (job.prefill == nullptr) continue;
    GiveUpPrefill(job);
    any = true;
  }
  plan.prefill = nullptr;
  return any;
}

absl::Status JobLoop::EndOnAllRanks(RunningJob& job, int64_t word, JobEnd otherwise, absl::Time deadline) {
  const bool here = Computes(job);
  const int owner = *job.generate.owner_rank;
  JobEnd end = std::move(otherwise);
  if (word != 0 && here) {
    end = *std::move(job.ended);
  } else if (word != 0) {
    const EndWord told = EndWord::From(word);
    end = {absl::Status(told.code, absl::StrCat("the generation failed on rank ", owner)), told.reason};
    if (job.done > told.done) {  // The owner rank's last step failed.
      engine().UnskipRow(*job.context);
      --job.done;
    }
  }
  if (!here) job.ids.resize(job.done);
  EDUBA_RETURN_IF_ERROR(
      engine().ShareRows(*job.context, owner, absl::MakeSpan(job.ids), *options_.group, deadline));
  if (!here) EDUBA_RETURN_IF_ERROR(ExtendSession(job, job.ids));
  Finish(job, end);
  return absl::OkStatus();
}

absl::Status JobLoop::RunEntries(absl::Time deadline, const std::vector<RunningJob*>& jobs,
                                 const std::vector<BatchEntry>& entries) {
  const int64_t width = engine().model().config().hidden_size;
  absl::Status status = engine().Step(entries, *options_.group, deadline);
  if (status.ok()) {
    const float* hidden = engine().hidden().data();
    for (size_t i = 0; i < jobs.size(); ++i) {
      EDUBA_RETURN_IF_ERROR(Advance(*jobs[i], entries[i], i, hidden));
      hidden += static_cast<int64_t>(entries[i].ids.size()) * width;
    }
    return absl::OkStatus();
  }
  // Arithmetic left the finite numbers, as on every rank that makes this step: only the job that did it shall
  // end, so each is tried alone.
  if (!absl::IsInvalidArgument(status)) return status;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (jobs.size() > 1) {
      // The failed step gave the memory back. A rank that had room for all entries has room for one.
      status = Reserve(*jobs[i], entries[i]);
      if (status.ok()) status = engine().Step({entries[i]}, *options_.group, deadline);
    }
    if (status.ok()) {
      EDUBA_RETURN_IF_ERROR(Advance(*jobs[i], entries[i], 0, engine().hidden().data()));
    } else if (absl::IsInvalidArgument(status)) {
      End(*jobs[i], {status});
    } else {
      return status;
    }
  }
  return absl::OkStatus();
}

absl::Status JobLoop::RunPrefill(absl::Time deadline, RunningJob& job) {
  EDUBA_RETURN_IF_ERROR(job.prefill->Run(job.prefill->units_of_a_chunk(), deadline));
  if (!job.prefill->done()) {
    ReportProgress(job, {});
    return absl::OkStatus();
  }
  // One that failed is given up in the next step.
  if (!job.prefill->status().ok()) return absl::OkStatus();
  engine().FinishPrefill(*job.prefill, *job.context, job.pooler ? &*job.pooler : nullptr);
  const std::vector<float>& log_probs = job.prefill->log_probs();
  job.log_probs.insert(job.log_probs.end(), log_probs.begin(), log_probs.end());
  const int64_t count = job.prefill->plan().positions.size();
  job.prefill.reset();
  return AdvanceReading(job, count);
}

absl::Status JobLoop::Advance(RunningJob& job, const BatchEntry& entry, size_t index, const float* hidden) {
  const size_t heads = job.sink_mass.size();
  for (size_t i = 0; i < heads; ++i) job.sink_mass[i] += engine().sink_mass()[index * heads + i];
  if (job.kind == Kind::kGenerate) return AdvanceGeneration(job);
  const int64_t width = engine().model().config().hidden_size;
  const auto rows = static_cast<int64_t>(entry.ids.size());
  if (job.kind == Kind::kScore) {
    job.before.insert(job.before.end(), hidden, hidden + (rows - 1) * width);
    const auto some = LogProbs(engine().model(), job.before, entry.ids);
    if (!some.ok()) {
      Finish(job, {some.status()});
      return absl::OkStatus();
    }
    job.log_probs.insert(job.log_probs.end(), some->begin(), some->end());
  }
  if (job.kind == Kind::kEmbed) job.pooler->Add(job.done, rows, hidden);
  return AdvanceReading(job, rows);
}

absl::Status JobLoop::ExtendSession(RunningJob& job, absl::Span<const int32_t> ids) const {
  const absl::Status status = ModelContent::Extend(*job.session, ids, job.kind == Kind::kGenerate);
  if (!status.ok()) options_.group->Abort(status);
  return status;
}

absl::Status JobLoop::AdvanceReading(RunningJob& job, int64_t count) {
  if (job.kind == Kind::kAppend) {
    EDUBA_RETURN_IF_ERROR(ExtendSession(job, absl::MakeConstSpan(job.ids).subspan(job.done, count)));
  }
  job.done += count;
  if (IsComplete(job)) {
    Finish(job, {});
  } else {
    ReportProgress(job, {});
  }
  return absl::OkStatus();
}

absl::Status JobLoop::AdvanceGeneration(RunningJob& job) {
  const int32_t id = job.chosen.id;
  EDUBA_RETURN_IF_ERROR(ExtendSession(job, {id}));
  job.ids.push_back(id);
  ++job.done;
  const std::vector<int32_t>& stop_ids = job.generate.stop_ids;
  bool stop = std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end();
  JobProgress progress;
  progress.token = job.chosen;
  progress.text = NextText(job, stop);
  const bool last = stop || job.done == job.generate.max_tokens;
  if (last && job.text_stream != nullptr) progress.text += job.text_stream->Finish();
  ReportProgress(job, progress);
  if (last) End(job, {absl::OkStatus(), stop ? FinishReason::kStop : FinishReason::kLength});
  return absl::OkStatus();
}

std::string JobLoop::NextText(RunningJob& job, bool& stop) {
  if (job.text_stream == nullptr) return "";
  std::string text = job.text_stream->Push(job.chosen.id);
  job.text_end += text;
  size_t longest = 0;
  for (const std::string& string : job.generate.stop_strings) {
    longest = std::max(longest, string.size());
    stop |= job.text_end.find(string) != std::string::npos;
  }
  if (job.text_end.size() > longest) job.text_end.erase(0, job.text_end.size() - longest);
  return text;
}

}  // namespace eduba
