#include "worker/model_sessions.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/placement.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "rpc/limits.h"
#include "worker/own_placement.h"

namespace eduba {
namespace {

absl::StatusOr<JobRequest> RequestOf(const v1::ModelAppend& given) {
  AppendJob append;
  EDUBA_ASSIGN_OR_RETURN(append.ids, NumbersOf<int32_t>(given.ids(), "token ids", 1));
  append.at = given.at();
  return append;
}

JobRequest RequestOf(const v1::ModelGenerate& given) {
  const v1::GenerateRequest& request = given.request();
  GenerateJob generate;
  generate.max_tokens = request.max_tokens();
  generate.sampling.temperature = request.temperature();
  generate.sampling.top_k = request.top_k();
  generate.sampling.top_p = request.top_p() == 0 ? 1 : request.top_p();
  generate.sampling.seed = request.seed();
  generate.stop_ids.assign(request.stop_ids().begin(), request.stop_ids().end());
  generate.stop_strings.assign(request.stop_strings().begin(), request.stop_strings().end());
  generate.sink_mass = request.sink_mass();
  if (given.has_owner_rank()) generate.owner_rank = given.owner_rank();
  return generate;
}

absl::StatusOr<JobRequest> RequestOf(const v1::ModelScore& given) {
  ScoreJob score;
  EDUBA_ASSIGN_OR_RETURN(score.ids, NumbersOf<int32_t>(given.ids(), "token ids", 1));
  score.sink_mass = given.sink_mass();
  return score;
}

absl::StatusOr<JobRequest> RequestOf(const v1::ModelEmbed& given) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int64_t> bounds, NumbersOf<int64_t>(given.ranges(), "ranges", 1));
  EmbedJob embed;
  for (size_t i = 0; i + 1 < bounds.size(); i += 2) embed.ranges.push_back({bounds[i], bounds[i + 1]});
  embed.pool = given.pool() == v1::POOL_LAST ? Pool::kLast : Pool::kMean;
  return embed;
}

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return v1::FINISH_REASON_UNSPECIFIED;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

}  // namespace

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

ModelEngine::Options ModelContentOptions(Backend* backend, PageStore* store, ServedModel* model) {
  ModelEngine::Options options;
  options.backend = backend;
  options.store = store;
  options.model = &model->transformer();
  options.kv_dtype = model->kv_dtype();
  return options;
}

ModelSessions::ModelSessions(Options options)
    : options_(std::move(options)),
      jobs_({options_.content, options_.group, options_.model->tokenizer(), /*listener=*/this}) {}

void ModelSessions::Retain(const v1::RetainSessions& request) {
  jobs_.Retain(std::set<uint64_t>(request.session_ids().begin(), request.session_ids().end()));
}

absl::StatusOr<v1::SessionContent> ModelSessions::Open(const v1::OpenSession& request) {
  const v1::ModelSpec& spec = request.spec().model();
  if (spec.model_hash() != options_.model->info().hash()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the session was created for another model than ", options_.model->info().name(),
                     ", which the workers hold; start them with that one, or create the session anew"));
  }
  const int rank = options_.group->rank();
  EDUBA_ASSIGN_OR_RETURN(const Placement placement,
                         OwnPlacement(request.placement(), options_.node, rank, options_.group->size()));
  EDUBA_RETURN_IF_ERROR(jobs_.Open(request.session_id(), ContextOptionsOf(spec), placement, rank));
  if (options_.tokens != nullptr) options_.tokens->Describe(request);
  EDUBA_ASSIGN_OR_RETURN(const ModelContent::Description description,
                         options_.content->Describe(request.session_id()));
  v1::SessionContent content;
  content.set_length(description.length);
  content.set_digest_low(description.digest);
  content.set_unread(!description.is_read);
  return content;
}

bool ModelSessions::IsJob(const v1::Command& command) const {
  switch (command.kind_case()) {
    case v1::Command::kModelAppend:
    case v1::Command::kModelGenerate:
    case v1::Command::kModelScore:
    case v1::Command::kModelEmbed:
      return true;
    case v1::Command::kSettleSession:
      return Holds(command.settle_session().session_id());
    default:
      return false;
  }
}

absl::Status ModelSessions::Start(const v1::Command& command) {
  JobId id{command.ordinal(), 0, absl::Milliseconds(command.timeout_ms())};
  switch (command.kind_case()) {
    case v1::Command::kModelAppend: {
      id.session_id = command.model_append().session_id();
      EDUBA_ASSIGN_OR_RETURN(JobRequest request, RequestOf(command.model_append()));
      return StartExtending(id, std::move(request));
    }
    case v1::Command::kModelGenerate:
      id.session_id = command.model_generate().session_id();
      return StartExtending(id, RequestOf(command.model_generate()));
    case v1::Command::kModelScore: {
      id.session_id = command.model_score().session_id();
      EDUBA_ASSIGN_OR_RETURN(JobRequest request, RequestOf(command.model_score()));
      return jobs_.Start(id, std::move(request));
    }
    case v1::Command::kModelEmbed: {
      id.session_id = command.model_embed().session_id();
      EDUBA_ASSIGN_OR_RETURN(JobRequest request, RequestOf(command.model_embed()));
      return jobs_.Start(id, std::move(request));
    }
    case v1::Command::kSettleSession:
      id.session_id = command.settle_session().session_id();
      return StartExtending(
          id, SettleJob{command.settle_session().length(), command.settle_session().read_again()});
    default:
      return absl::InternalError("the command is no job");
  }
}

absl::Status ModelSessions::StartExtending(const JobId& id, JobRequest request) {
  extended_[id.id] = id.session_id;  // Its result may come within the call.
  absl::Status status = jobs_.Start(id, std::move(request));
  if (!status.ok()) extended_.erase(id.id);
  return status;
}

void ModelSessions::OnProgress(uint64_t job, const JobProgress& progress) {
  v1::ModelProgress message;
  if (progress.token) {
    v1::GenerateResponse::Tokens& tokens = *message.mutable_tokens();
    tokens.set_ids(BytesOf(absl::MakeConstSpan(&progress.token->id, 1)));
    tokens.set_log_probs(BytesOf(absl::MakeConstSpan(&progress.token->log_prob, 1)));
    tokens.set_text(progress.text);
  }
  SendProgress(job, std::move(message));
}

void ModelSessions::OnResult(uint64_t job, const JobResult& result) {
  SendVectors(job, result.vectors);
  v1::WorkerMessage message;
  v1::CommandResult& answer = *message.mutable_result();
  answer.set_epoch(options_.epoch);
  answer.set_ordinal(job);
  answer.set_code(static_cast<int>(result.status.code()));
  answer.set_message(std::string(result.status.message()));
  v1::ModelResult& model = *answer.mutable_model();
  model.set_done(result.done);
  model.set_already_stored(result.already_stored);
  model.set_length(result.length);
  model.set_finish_reason(ToProto(result.finish_reason));
  model.set_cancelled(result.cancelled);
  model.set_digest(result.digest);
  model.set_log_probs(BytesOf(absl::MakeConstSpan(result.log_probs)));
  model.set_sink_mass(BytesOf(absl::MakeConstSpan(result.sink_mass)));
  const auto extended = extended_.extract(job);
  const bool unsynced = options_.tokens != nullptr && !extended.empty();
  options_.send(message, unsynced ? options_.tokens->FramesOf(extended.mapped()) : nullptr);
}

void ModelSessions::SendVectors(uint64_t job, absl::Span<const float> vectors) {
  const int64_t width = options_.model->info().hidden_size();
  const auto ranges = static_cast<int64_t>(vectors.size()) / width;
  const int64_t piece =
      std::max<int64_t>(1, kPayloadBytesMax / (width * static_cast<int64_t>(sizeof(float))));
  for (int64_t first = 0; first < ranges; first += piece) {
    const int64_t count = std::min(piece, ranges - first);
    v1::ModelProgress progress;
    progress.mutable_embeddings()->set_first_range(first);
    progress.mutable_embeddings()->set_count(static_cast<int32_t>(count));
    progress.mutable_embeddings()->set_vectors(BytesOf(vectors.subspan(first * width, count * width)));
    SendProgress(job, std::move(progress));
  }
}

void ModelSessions::SendProgress(uint64_t job, v1::ModelProgress progress) {
  progress.set_ordinal(job);
  progress.set_epoch(options_.epoch);
  v1::WorkerMessage message;
  *message.mutable_progress() = std::move(progress);
  options_.send(message, nullptr);
}

}  // namespace eduba
