#include "worker/model_sessions.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "model/log_probs.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

constexpr int64_t kStatusCodes = 32;
constexpr int64_t kFinishReasons = 16;

// What a generation's home tells the others of its end; 0 would be: it goes on. `done`: its tokens.
int64_t WordOf(const absl::Status& status, v1::FinishReason reason, int64_t done) {
  return 1 + static_cast<int64_t>(status.code()) + kStatusCodes * (reason + kFinishReasons * done);
}

// Sessions whose logits are held at once.
constexpr int64_t kLogitRows = 32;

template <typename T>
absl::StatusOr<std::vector<T>> Numbers(const std::string& bytes, const char* what) {
  if (bytes.empty() || bytes.size() % sizeof(T) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " have ", bytes.size(), " bytes, wanted a positive multiple of ", sizeof(T)));
  }
  std::vector<T> numbers(bytes.size() / sizeof(T));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return numbers;
}

template <typename T>
std::string BytesOf(absl::Span<const T> numbers) {
  return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T));
}

template <typename T>
uint64_t HashInto(uint64_t hash, absl::Span<const T> numbers) {
  return XXH3_64bits_withSeed(numbers.data(), numbers.size() * sizeof(T), hash);
}

ContextOptions ContextOptionsOf(const v1::ModelSpec& spec) {
  ContextOptions options;
  if (spec.policy() == v1::MODEL_POLICY_STREAMING) options.policy = ContextPolicy::kStreaming;
  if (spec.policy() == v1::MODEL_POLICY_STAR) options.policy = ContextPolicy::kStar;
  if (spec.positions() == v1::POSITION_MODE_ROLLING) options.positions = PositionMode::kRolling;
  if (spec.positions() == v1::POSITION_MODE_CLAMPED) options.positions = PositionMode::kClamped;
  options.sink_tokens = spec.sink_tokens();
  options.window = spec.window();
  options.clamp = spec.clamp();
  return options;
}

ModelEngine::Options EngineOptions(const ModelSessions::Options& options) {
  ModelEngine::Options engine;
  engine.backend = options.backend;
  engine.store = options.store;
  engine.model = &options.model->transformer();
  engine.kv_dtype = options.model->kv_dtype();
  engine.chunk_rows = options.chunk_rows;
  engine.communicator = options.group;
  return engine;
}

}  // namespace

ModelSessions::ModelSessions(Options options)
    : options_(std::move(options)), engine_(EngineOptions(options_)) {}

absl::Status ModelSessions::Open(uint64_t session_id, const v1::SessionSpec& spec) {
  if (spec.model().model_hash() != options_.model->info().hash()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the session was created for another model than ", options_.model->info().name(),
                     ", which the workers hold; start them with that one, or create the session anew"));
  }
  if (sessions_.count(session_id) > 0) {
    return absl::AlreadyExistsError(absl::StrCat("session ", session_id, " is open already"));
  }
  EDUBA_ASSIGN_OR_RETURN(Context context, engine_.Open(ContextOptionsOf(spec.model()), spec.stripe_pages()));
  Session session(std::move(context));
  session.stripe_pages = spec.stripe_pages();
  sessions_.emplace(session_id, std::move(session));
  return absl::OkStatus();
}

void ModelSessions::Close(uint64_t session_id) {
  for (auto next = jobs_.begin(); next != jobs_.end();) {
    Job& job = next++->second;
    if (job.session_id == session_id) {
      job.done = 0;  // Nothing is left of it; and what a home has done, the others need not know yet.
      Finish(job, {absl::NotFoundError("the session was deleted")});
    }
  }
  sessions_.erase(session_id);
}

absl::Status ModelSessions::Fork(const v1::ForkSession& request) {
  EDUBA_ASSIGN_OR_RETURN(const Session* session, Find(request.session_id()));
  if (!sessions_.emplace(request.fork_id(), *session).second) {
    return absl::AlreadyExistsError(absl::StrCat("session ", request.fork_id(), " is open already"));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelSessions::Session*> ModelSessions::Find(uint64_t session_id) {
  const auto found = sessions_.find(session_id);
  if (found == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("session ", session_id, " is not open on this worker"));
  }
  return &found->second;
}

absl::Status ModelSessions::Start(const v1::Command& command) {
  Job job;
  job.ordinal = command.ordinal();
  job.patience = absl::Milliseconds(command.timeout_ms());
  switch (command.kind_case()) {
    case v1::Command::kModelAppend:
      EDUBA_RETURN_IF_ERROR(StartAppend(command.model_append(), job));
      break;
    case v1::Command::kModelGenerate:
      EDUBA_RETURN_IF_ERROR(StartGenerate(command.model_generate(), job));
      break;
    case v1::Command::kModelScore:
      EDUBA_RETURN_IF_ERROR(StartScore(command.model_score(), job));
      break;
    default:
      EDUBA_RETURN_IF_ERROR(StartEmbed(command.model_embed(), job));
      break;
  }
  Job& started = jobs_.emplace(job.ordinal, std::move(job)).first->second;
  if (started.fork) started.context = &*started.fork;
  return absl::OkStatus();
}

absl::Status ModelSessions::CheckIds(absl::Span<const int32_t> ids) const {
  const int64_t vocab = options_.model->info().vocab_size();
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", i, " is ", ids[i], ", wanted 0 to ", vocab - 1));
    }
  }
  return absl::OkStatus();
}

absl::Status ModelSessions::StartAppend(const v1::ModelAppend& request, Job& job) {
  EDUBA_ASSIGN_OR_RETURN(Session * session, Find(request.session_id()));
  EDUBA_ASSIGN_OR_RETURN(job.ids, Numbers<int32_t>(request.ids(), "token ids"));
  EDUBA_RETURN_IF_ERROR(CheckIds(job.ids));
  job.kind = Kind::kAppend;
  job.session_id = request.session_id();
  job.context = &session->context;
  return absl::OkStatus();
}

absl::Status ModelSessions::StartGenerate(const v1::ModelGenerate& request, Job& job) {
  EDUBA_ASSIGN_OR_RETURN(Session * session, Find(request.session_id()));
  if (session->context.length() == 0) {
    return absl::FailedPreconditionError("the session is empty; append a prompt before generating");
  }
  job.kind = Kind::kGenerate;
  job.session_id = request.session_id();
  job.context = &session->context;
  job.generate = request.request();
  if (request.has_owner_rank()) {
    if (request.owner_rank() < 0 || request.owner_rank() >= options_.group->size() || !session->context.windowed()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "rank ", request.owner_rank(), " cannot generate alone: the group has ", options_.group->size(), " ranks",
          session->context.windowed() ? "" : ", and some layers see keys of all of them"));
    }
    job.home = request.owner_rank();
  }
  WantSinkMass(request.request().sink_mass(), job);
  job.sampling.temperature = job.generate.temperature();
  job.sampling.top_k = job.generate.top_k();
  job.sampling.top_p = job.generate.top_p() == 0 ? 1 : job.generate.top_p();
  job.sampling.seed = job.generate.seed();
  EDUBA_RETURN_IF_ERROR(CheckSampling(job.sampling));
  if (options_.model->tokenizer() != nullptr) {
    job.text_stream = options_.model->tokenizer()->NewTextStream({});
  } else if (job.generate.stop_strings_size() > 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("stop strings need a tokenizer, and the folder of model ", options_.model->info().name(),
                     " has none; use stop ids"));
  }
  return absl::OkStatus();
}

absl::Status ModelSessions::StartScore(const v1::ModelScore& request, Job& job) {
  EDUBA_ASSIGN_OR_RETURN(Session * session, Find(request.session_id()));
  if (session->context.length() == 0) {
    return absl::FailedPreconditionError(
        "the session is empty: the first token of a context has no probability; append one before");
  }
  EDUBA_ASSIGN_OR_RETURN(job.ids, Numbers<int32_t>(request.ids(), "token ids"));
  EDUBA_RETURN_IF_ERROR(CheckIds(job.ids));
  job.kind = Kind::kScore;
  job.session_id = request.session_id();
  job.fork = session->context.Fork();
  WantSinkMass(request.sink_mass(), job);
  return absl::OkStatus();
}

absl::Status ModelSessions::StartEmbed(const v1::ModelEmbed& request, Job& job) {
  EDUBA_ASSIGN_OR_RETURN(Session * session, Find(request.session_id()));
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int64_t> bounds, Numbers<int64_t>(request.ranges(), "ranges"));
  std::vector<PositionRange> ranges;
  for (size_t i = 0; i + 1 < bounds.size(); i += 2) ranges.push_back({bounds[i], bounds[i + 1]});
  if (ranges.empty() || ranges.back().end > session->context.length()) {
    return absl::OutOfRangeError(absl::StrCat("the last range ends at ",
                                              ranges.empty() ? 0 : ranges.back().end, ", the session has ",
                                              session->context.length(), " positions"));
  }
  EDUBA_RETURN_IF_ERROR(Pooler::CheckRanges(ranges));
  EDUBA_ASSIGN_OR_RETURN(job.fork, engine_.Open(session->context.options(), session->stripe_pages));
  job.kind = Kind::kEmbed;
  job.session_id = request.session_id();
  // A chunk first: where this rank has no memory, only the ranks that have it would know how to begin a wave.
  job.in_chunks_until = 1;
  job.ids = {0};  // Of a turn that does not come about, while there is no memory.
  job.ranges = std::move(ranges);
  job.pool = request.pool() == v1::POOL_LAST ? Pool::kLast : Pool::kMean;
  return absl::OkStatus();
}

void ModelSessions::BeginEmbed(Job& job) {
  const int64_t end = job.ranges.back().end;
  // Ids; for every range a word and a float a channel, and a count.
  const int64_t width = options_.model->info().hidden_size();
  auto memory =
      options_.store->ReserveBytes(4 * end + static_cast<int64_t>(job.ranges.size()) * (12 * width + 8));
  job.no_memory = memory.status();
  if (!memory.ok()) return;
  std::vector<int32_t> ids(end);
  job.no_memory = sessions_.at(job.session_id).ids.Read(0, absl::MakeSpan(ids));
  if (!job.no_memory.ok()) return;
  job.memory = *std::move(memory);
  job.ids = std::move(ids);
  job.pooler = Pooler::Create(job.ranges, job.pool, options_.model->transformer().hidden_exponents()).value();
}

void ModelSessions::Cancel(uint64_t ordinal) {
  const auto job = jobs_.find(ordinal);
  if (job == jobs_.end()) return;
  if (job->second.home) {
    job->second.cancelled = true;
  } else {
    Finish(job->second, {absl::OkStatus(), v1::FINISH_REASON_UNSPECIFIED, /*cancelled=*/true});
  }
}

void ModelSessions::FailAll(const absl::Status& status) {
  while (!jobs_.empty()) Finish(jobs_.begin()->second, {status});
}

std::vector<ModelSessions::Job*> ModelSessions::NextJobs() {
  std::vector<Job*> jobs;
  Job* first_reader = nullptr;
  Job* next_reader = nullptr;
  for (auto& [ordinal, job] : jobs_) {
    if (job.kind == Kind::kGenerate) {
      jobs.push_back(&job);
      continue;
    }
    if (first_reader == nullptr) first_reader = &job;
    if (next_reader == nullptr && ordinal > last_reader_) next_reader = &job;
  }
  if (next_reader == nullptr) next_reader = first_reader;
  if (next_reader != nullptr) {
    last_reader_ = next_reader->ordinal;
    jobs.push_back(next_reader);
  }
  return jobs;
}

void ModelSessions::ChooseTokens(std::vector<Job*>& jobs) {
  const auto choose = [&](absl::Span<Job* const> some) {
    std::vector<float> hidden;
    for (const Job* job : some) {
      hidden.insert(hidden.end(), job->context->last().begin(), job->context->last().end());
    }
    EDUBA_ASSIGN_OR_RETURN(const std::vector<float> logits, engine_.Logits(hidden));
    const auto vocab = static_cast<int64_t>(logits.size() / some.size());
    for (size_t i = 0; i < some.size(); ++i) {
      const auto own = absl::MakeConstSpan(logits).subspan(static_cast<int64_t>(i) * vocab, vocab);
      some[i]->chosen = ChooseToken(own, some[i]->sampling, some[i]->context->length());
    }
    return absl::OkStatus();
  };
  std::vector<Job*> generating;
  for (Job* job : jobs) {
    const bool goes_on = !job->over && !job->cancelled;
    if (job->kind == Kind::kGenerate && Computes(*job) && goes_on) generating.push_back(job);
  }
  for (size_t first = 0; first < generating.size(); first += kLogitRows) {
    const absl::Span<Job* const> some = absl::MakeConstSpan(generating).subspan(first, kLogitRows);
    if (choose(some).ok()) continue;
    for (Job* job : some) {
      const absl::Status status = choose({job});
      if (status.ok()) continue;
      // With a home, it stays among them until the others know.
      if (!job->home) jobs.erase(std::find(jobs.begin(), jobs.end(), job));
      EndByItself(*job, {status});
    }
  }
}

bool ModelSessions::GoesByWave(Job& job, bool& room) {
  // A wave's rows are spread over the ranks, and nobody gathers their sink mass.
  if (job.kind == Kind::kGenerate || !job.sink_mass.empty()) return false;
  room = true;
  if (job.wave == nullptr) {
    if (job.done < job.in_chunks_until) return false;
    // One at a time: a wave holds the hidden states of a stripe.
    for (const auto& [ordinal, other] : jobs_) {
      if (other.wave != nullptr) return false;
    }
    job.wave = engine_.StartWave(*job.context, absl::MakeConstSpan(job.ids).subspan(job.done),
                                 job.kind == Kind::kScore, job.kind == Kind::kScore,
                                 job.pooler ? &*job.pooler : nullptr);
    if (job.wave == nullptr) {
      job.in_chunks_until = static_cast<int64_t>(job.ids.size());
      return false;
    }
    room = job.wave->Reserve().ok();
  }
  room = room && job.wave->status().ok();
  return true;
}

void ModelSessions::GiveUpWave(Job& job) {
  job.in_chunks_until = job.done + job.wave->plan().positions.size();
  job.wave.reset();
}

Turn ModelSessions::MakeTurn(Job& job) {
  Turn turn;
  turn.context = job.context;
  if (job.kind == Kind::kGenerate) {
    turn.ids = absl::MakeConstSpan(&job.chosen.id, 1);
    turn.asks = true;
    return turn;
  }
  const absl::Span<const int32_t> left = absl::MakeConstSpan(job.ids).subspan(job.done);
  turn.ids = left.first(engine_.NextChunk(*job.context, static_cast<int64_t>(left.size())));
  turn.asks = job.kind == Kind::kScore;
  if (job.kind == Kind::kScore) job.before.assign(job.context->last().begin(), job.context->last().end());
  return turn;
}

void ModelSessions::WantSinkMass(bool wanted, Job& job) const {
  const v1::Model& model = options_.model->info();
  if (wanted) job.sink_mass.assign(int64_t{model.layer_windows_size()} * model.query_heads(), 0);
}

void ModelSessions::AddSinkMass(size_t index, Job& job) const {
  const size_t heads = job.sink_mass.size();
  for (size_t i = 0; i < heads; ++i) job.sink_mass[i] += engine_.sink_mass()[index * heads + i];
}

absl::StatusOr<uint64_t> ModelSessions::AgreeOnStep(uint64_t newest, absl::Time deadline,
                                                    std::vector<Job*>& jobs, std::vector<Turn>& turns,
                                                    Job*& waver, bool room) {
  // For every turn: the ranks without memory for it, and whether it is over at home.
  std::vector<int64_t> words(1 + 2 * turns.size() + (waver != nullptr ? 1 : 0), 0);
  if (waver != nullptr && !room) words.back() = 1;
  std::vector<absl::Status> prepared(turns.size());
  if (options_.group->rank() == 0) words[0] = static_cast<int64_t>(newest);
  for (size_t i = 0; i < turns.size(); ++i) {
    const Job& job = *jobs[i];
    if (job.over) {
      words[2 + 2 * i] = WordOf(job.over->status, job.over->reason, job.done);
    } else if (!job.cancelled) {
      prepared[i] = job.no_memory.ok() ? engine_.Prepare(turns[i]) : job.no_memory;
      if (!prepared[i].ok()) words[1 + 2 * i] = 1;
    }
  }
  EDUBA_RETURN_IF_ERROR(options_.group->SumI64(absl::MakeSpan(words), deadline));
  const auto is_over = [&](size_t i) { return words[2 + 2 * i] != 0 || jobs[i]->cancelled; };
  // No memory, or numbers that are not finite: chunks need less of the one, and say where the other is.
  bool waves = waver != nullptr && words.back() != 0;  // Whether any had memory that a turn may have missed.
  if (waves) GiveUpWave(*std::exchange(waver, nullptr));
  bool lacking = false;
  for (size_t i = 0; i < turns.size(); ++i) lacking |= words[1 + 2 * i] > 0 && !is_over(i);
  if (lacking) {
    for (auto& [ordinal, job] : jobs_) {
      if (job.wave == nullptr) continue;
      GiveUpWave(job);
      waves = true;
      waver = nullptr;
    }
  }
  for (size_t i = turns.size(); i-- > 0;) {
    Job& job = *jobs[i];
    const bool over = is_over(i);
    const int64_t ranks_without = words[1 + 2 * i];
    if (!over && ranks_without == 0) continue;
    engine_.Unprepare(*turns[i].context);
    jobs.erase(jobs.begin() + static_cast<int64_t>(i));
    turns.erase(turns.begin() + static_cast<int64_t>(i));
    if (!over && waves) continue;
    End end;
    if (over) {
      end.cancelled = true;
    } else if (!prepared[i].ok()) {
      end.status = prepared[i];
    } else {
      end.status = ModelEngine::NoMemoryElsewhere(ranks_without);
    }
    if (job.home) {
      EDUBA_RETURN_IF_ERROR(EndAtHome(job, words[2 + 2 * i], std::move(end), deadline));
    } else {
      Finish(job, end);
    }
  }
  return static_cast<uint64_t>(words[0]);
}

absl::Status ModelSessions::EndAtHome(Job& job, int64_t word, End otherwise, absl::Time deadline) {
  const bool here = Computes(job);
  End end = std::move(otherwise);
  if (word != 0 && here) {
    end = *std::move(job.over);
  } else if (word != 0) {
    const int64_t behind_code = (word - 1) / kStatusCodes;
    end = {absl::Status(static_cast<absl::StatusCode>((word - 1) % kStatusCodes),
                        absl::StrCat("the generation failed on rank ", *job.home)),
           static_cast<v1::FinishReason>(behind_code % kFinishReasons)};
    if (job.done > behind_code / kFinishReasons) {  // The last row did not come about.
      engine_.Unfollow(*job.context);
      --job.done;
    }
  }
  if (!here) job.ids.resize(job.done);
  EDUBA_RETURN_IF_ERROR(engine_.HandOver(*job.context, *job.home, absl::MakeSpan(job.ids), deadline));
  if (!here) {
    sessions_.at(job.session_id).ids.Append(job.ids);
  }
  Finish(job, end);
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> ModelSessions::Step(uint64_t newest) {
  std::vector<Job*> jobs = NextJobs();
  absl::Duration patience;
  for (const Job* job : jobs) patience = std::max(patience, job->patience);
  ChooseTokens(jobs);
  if (!jobs.empty() && jobs.back()->kind == Kind::kEmbed && !jobs.back()->pooler) BeginEmbed(*jobs.back());
  Job* waver = nullptr;
  bool room = false;
  if (!jobs.empty() && GoesByWave(*jobs.back(), room)) {  // Who reads comes last.
    waver = jobs.back();
    jobs.pop_back();
  }
  std::vector<Turn> turns;
  turns.reserve(jobs.size());
  for (Job* job : jobs) turns.push_back(MakeTurn(*job));
  const absl::Time deadline = absl::Now() + patience;
  EDUBA_ASSIGN_OR_RETURN(const uint64_t agreed, AgreeOnStep(newest, deadline, jobs, turns, waver, room));
  std::vector<Job*> own_jobs;
  std::vector<Turn> own_turns;
  std::vector<Job*> common_jobs;
  std::vector<Turn> common_turns;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (!jobs[i]->home) {
      common_jobs.push_back(jobs[i]);
      common_turns.push_back(turns[i]);
    } else if (Computes(*jobs[i])) {
      own_jobs.push_back(jobs[i]);
      own_turns.push_back(turns[i]);
    } else {
      engine_.Follow(*turns[i].context);
      ++jobs[i]->done;
    }
  }
  // Apart, because what fails in a step fails on all ranks that make it.
  EDUBA_RETURN_IF_ERROR(RunStep(deadline, common_jobs, common_turns));
  EDUBA_RETURN_IF_ERROR(RunStep(deadline, own_jobs, own_turns));
  if (waver != nullptr) EDUBA_RETURN_IF_ERROR(RunWave(deadline, *waver));
  return agreed;
}

absl::Status ModelSessions::RunStep(absl::Time deadline, const std::vector<Job*>& jobs,
                                    const std::vector<Turn>& turns) {
  const int64_t width = options_.model->info().hidden_size();
  absl::Status status = engine_.StepPrepared(turns, deadline);
  if (status.ok()) {
    const float* hidden = engine_.hidden().data();
    for (size_t i = 0; i < jobs.size(); ++i) {
      const auto rows = static_cast<int64_t>(turns[i].ids.size());
      AddSinkMass(i, *jobs[i]);
      Advance(*jobs[i], turns[i], hidden);
      hidden += rows * width;
    }
    return absl::OkStatus();
  }
  // Arithmetic that left the finite numbers, as on every rank that makes this step: only the job that did it
  // shall end.
  if (!absl::IsInvalidArgument(status)) return status;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (jobs.size() > 1) {
      // The failed step gave the memory back. Who had room for all turns has room for one.
      status = engine_.Prepare(turns[i]);
      if (status.ok()) status = engine_.StepPrepared({turns[i]}, deadline);
    }
    if (status.ok()) {
      AddSinkMass(0, *jobs[i]);
      Advance(*jobs[i], turns[i], engine_.hidden().data());
    } else if (absl::IsInvalidArgument(status)) {
      EndByItself(*jobs[i], {status});
    } else {
      return status;
    }
  }
  return absl::OkStatus();
}

absl::Status ModelSessions::RunWave(absl::Time deadline, Job& job) {
  EDUBA_RETURN_IF_ERROR(job.wave->Run(job.wave->units_of_a_chunk(), deadline));
  if (!job.wave->done()) {
    SendProgress(job, {});
    return absl::OkStatus();
  }
  // One that failed ends ahead of the next step.
  if (!job.wave->status().ok()) return absl::OkStatus();
  engine_.FinishWave(*job.wave, *job.context, job.pooler ? &*job.pooler : nullptr);
  const std::vector<float>& log_probs = job.wave->log_probs();
  job.log_probs.insert(job.log_probs.end(), log_probs.begin(), log_probs.end());
  const int64_t count = job.wave->plan().positions.size();
  job.wave.reset();
  AdvanceReading(job, count);
  return absl::OkStatus();
}

void ModelSessions::Advance(Job& job, const Turn& turn, const float* hidden) {
  const int64_t width = options_.model->info().hidden_size();
  const auto rows = static_cast<int64_t>(turn.ids.size());
  if (job.kind == Kind::kGenerate) return AdvanceGeneration(job);
  if (job.kind == Kind::kScore) {
    job.before.insert(job.before.end(), hidden, hidden + (rows - 1) * width);
    const auto some = LogProbs(options_.model->transformer(), job.before, turn.ids);
    if (!some.ok()) return Finish(job, {some.status()});
    job.log_probs.insert(job.log_probs.end(), some->begin(), some->end());
  }
  if (job.kind == Kind::kEmbed) job.pooler->Add(job.done, rows, hidden);
  AdvanceReading(job, rows);
}

void ModelSessions::AdvanceReading(Job& job, int64_t count) {
  if (job.kind == Kind::kAppend) {
    sessions_.at(job.session_id).ids.Append(absl::MakeConstSpan(job.ids).subspan(job.done, count));
  }
  job.done += count;
  if (job.done == static_cast<int64_t>(job.ids.size())) {
    return Finish(job, {});
  }
  SendProgress(job, {});
}

void ModelSessions::AdvanceGeneration(Job& job) {
  sessions_.at(job.session_id).ids.Append(absl::MakeConstSpan(&job.chosen.id, 1));
  job.ids.push_back(job.chosen.id);
  ++job.done;
  const auto& stop_ids = job.generate.stop_ids();
  bool stop = std::find(stop_ids.begin(), stop_ids.end(), job.chosen.id) != stop_ids.end();
  std::string text = job.text_stream != nullptr ? job.text_stream->Push(job.chosen.id) : "";
  job.tail += text;
  for (const std::string& string : job.generate.stop_strings()) {
    stop |= job.tail.find(string) != std::string::npos;
  }
  if (job.tail.size() > kStopStringBytesMax) job.tail.erase(0, job.tail.size() - kStopStringBytesMax);
  const bool last = stop || job.done == job.generate.max_tokens();
  if (last && job.text_stream != nullptr) text += job.text_stream->Finish();

  v1::ModelProgress progress;
  v1::GenerateResponse::Tokens& tokens = *progress.mutable_tokens();
  tokens.set_ids(BytesOf(absl::MakeConstSpan(&job.chosen.id, 1)));
  tokens.set_log_probs(BytesOf(absl::MakeConstSpan(&job.chosen.log_prob, 1)));
  tokens.set_text(std::move(text));
  SendProgress(job, std::move(progress));
  if (last) {
    EndByItself(job, {absl::OkStatus(), stop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH});
  }
}

void ModelSessions::SendProgress(const Job& job, v1::ModelProgress progress) {
  if (!Tells(job)) return;
  progress.set_ordinal(job.ordinal);
  progress.set_epoch(options_.epoch);
  v1::WorkerMessage message;
  *message.mutable_progress() = std::move(progress);
  options_.send(message);
}

void ModelSessions::SendEmbeddings(const Job& job, const std::vector<float>& vectors) {
  const int64_t width = options_.model->info().hidden_size();
  const auto ranges = static_cast<int64_t>(vectors.size()) / width;
  const int64_t piece =
      std::max<int64_t>(1, kPayloadBytesMax / (width * static_cast<int64_t>(sizeof(float))));
  for (int64_t first = 0; first < ranges; first += piece) {
    const int64_t count = std::min(piece, ranges - first);
    v1::ModelProgress progress;
    progress.mutable_embeddings()->set_first_range(first);
    progress.mutable_embeddings()->set_count(static_cast<int32_t>(count));
    progress.mutable_embeddings()->set_vectors(
        BytesOf(absl::MakeConstSpan(vectors).subspan(first * width, count * width)));
    SendProgress(job, std::move(progress));
  }
}

void ModelSessions::EndByItself(Job& job, End end) {
  if (job.home) {
    job.over = std::move(end);
  } else {
    Finish(job, end);
  }
}

void ModelSessions::Finish(Job& job, const End& end) {
  v1::WorkerMessage message;
  v1::CommandResult& result = *message.mutable_result();
  result.set_epoch(options_.epoch);
  result.set_ordinal(job.ordinal);
  v1::ModelResult& answer = *result.mutable_model();
  uint64_t digest = HashInto(0, job.context->last());
  digest = HashInto(digest, absl::MakeConstSpan(job.log_probs));
  digest = HashInto(digest, absl::MakeConstSpan(job.sink_mass));
  absl::Status status = end.status;
  if (status.ok() && !end.cancelled && job.pooler) {
    const auto vectors = job.pooler->Finish();
    status = vectors.status();
    if (vectors.ok()) {
      digest = HashInto(digest, absl::MakeConstSpan(*vectors));
      SendEmbeddings(job, *vectors);
    }
  }
  result.set_code(static_cast<int>(status.code()));
  result.set_message(std::string(status.message()));
  answer.set_done(job.done);
  answer.set_length(job.context->length());
  answer.set_finish_reason(end.reason);
  answer.set_cancelled(end.cancelled);
  if (Computes(job)) answer.set_digest(digest);
  if (Tells(job)) {
    answer.set_log_probs(BytesOf(absl::MakeConstSpan(job.log_probs)));
    std::vector<float> mass;
    const auto rows = static_cast<double>(std::max<int64_t>(1, job.done));
    for (const int64_t sum : job.sink_mass) {
      mass.push_back(static_cast<float>(static_cast<double>(sum) * kSinkMassUnit / rows));
    }
    answer.set_sink_mass(BytesOf(absl::MakeConstSpan(mass)));
  }
  jobs_.erase(job.ordinal);
  options_.send(message);
}

}  // namespace eduba
