#include "worker/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "attention/sharded_attention.h"
#include "base/log.h"
#include "base/placement.h"
#include "base/status_macros.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// Numbers travel as this machine stores them; another byte order would need a conversion here.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

template <typename T>
std::string BytesOf(const std::vector<T>& numbers) {
  return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T));
}

absl::StatusOr<SequenceSpec> SequenceSpecOf(const v1::SessionSpec& given) {
  EDUBA_ASSIGN_OR_RETURN(const v1::SessionSpec spec, CompleteSpec(given));
  SequenceSpec result;
  result.shape.query_heads = spec.query_heads();
  result.shape.kv_heads = spec.kv_heads();
  result.shape.head_dim = spec.head_dim();
  result.shape.value_dim = spec.value_dim();
  EDUBA_ASSIGN_OR_RETURN(result.shape.dtype, DTypeFromProto(spec.dtype()));
  result.shape.scale = spec.scale();
  result.shape.softcap = spec.softcap();
  result.layers = spec.layers();
  result.sink_tokens = spec.sink_tokens();
  result.window = spec.window();
  result.sink_logits.assign(spec.sink_logits().begin(), spec.sink_logits().end());
  return result;
}

// An error of AttendSharded with a code that tells the coordinator whether the group is dead: only
// INVALID_ARGUMENT leaves it alive.
absl::Status BrokenGroup(const absl::Status& status) {
  if (absl::IsInvalidArgument(status) || absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) {
    return status;
  }
  return absl::AbortedError(std::string(status.message()));
}

// Whether a command goes on step by step once it has begun.
bool IsJob(const v1::Command& command) {
  return command.has_model_append() || command.has_model_generate() || command.has_model_score() ||
         command.has_model_embed();
}

// What is wrong with the step whatever a rank holds: every rank finds the same, so none enters a collective.
absl::Status CheckStep(const v1::AttendStep& step, const SequenceSpec& spec) {
  const AttentionShape& shape = spec.shape;
  if (step.rows() < 1 || step.rows() > kStepRowsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("step has ", step.rows(), " rows, wanted 1 to ", kStepRowsMax));
  }
  if (step.layer() < 0 || step.layer() >= spec.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", step.layer(), ", wanted 0 to ", spec.layers - 1));
  }
  if (step.positions_size() != step.rows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("step of ", step.rows(), " rows has ", step.positions_size(), " positions"));
  }
  const size_t query_bytes = sizeof(float) * step.rows() * shape.query_heads * shape.head_dim;
  if (step.queries().size() != query_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("queries have ", step.queries().size(), " bytes, wanted ", query_bytes));
  }
  if (step.policy() != v1::POLICY_GLOBAL && step.policy() != v1::POLICY_WINDOW) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", static_cast<int>(step.policy()), " is not known"));
  }
  if (step.policy() == v1::POLICY_WINDOW && spec.window == 0) {
    return absl::InvalidArgumentError("policy is window, but the session was created without --window");
  }
  for (const int64_t position : step.positions()) {
    if (position < 0 || position >= step.length()) {
      return absl::OutOfRangeError(
          absl::StrCat("query position is ", position, ", wanted 0 to ", step.length() - 1));
    }
  }
  const auto* queries = reinterpret_cast<const float*>(step.queries().data());
  const int64_t elements = static_cast<int64_t>(query_bytes / sizeof(float));
  if (!std::all_of(queries, queries + elements, [](float q) { return std::isfinite(q); })) {
    return absl::InvalidArgumentError("queries have a NaN or Inf, wanted finite numbers");
  }
  return absl::OkStatus();
}

}  // namespace

Engine::Engine(Options options) : options_(std::move(options)), thread_([this] { Run(); }) {}

Engine::~Engine() { Stop(); }

void Engine::Handle(v1::GroupMessage message) {
  const std::scoped_lock lock(mutex_);
  Task task;
  task.received = absl::Now();
  if (message.has_form()) {
    if (latest_ != nullptr) {
      End(*latest_, absl::AbortedError(absl::StrCat("epoch ", latest_->form.epoch(), " is over: epoch ",
                                                    message.form().epoch(), " begins")));
    }
    latest_ = std::make_shared<Formation>();
    latest_->form = message.form();
    task.formation = latest_;
  } else if (message.has_abort() && latest_ != nullptr && latest_->form.epoch() == message.abort().epoch()) {
    End(*latest_, absl::AbortedError(absl::StrCat("epoch ", message.abort().epoch(),
                                                  " is over: ", message.abort().reason())));
  }
  task.message = std::move(message);
  tasks_.push_back(std::move(task));
  changed_.notify_one();
}

absl::Status Engine::Upload(const v1::UploadRequest& request) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, DTypeFromProto(request.dtype()));
  EDUBA_RETURN_IF_ERROR(append->AddRows(request.layer(), request.first_position(), request.count(), dtype,
                                        request.keys(), request.values()));
  const std::scoped_lock lock(mutex_);
  touched_.insert(request.append_id());
  return absl::OkStatus();
}

std::vector<uint64_t> Engine::TakeTouchedAppends() {
  const std::scoped_lock lock(mutex_);
  std::vector<uint64_t> touched(touched_.begin(), touched_.end());
  touched_.clear();
  return touched;
}

void Engine::Stop() {
  {
    const std::scoped_lock lock(mutex_);
    if (latest_ != nullptr) End(*latest_, absl::AbortedError("the worker stops"));
    stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void Engine::End(Formation& formation, const absl::Status& reason) {
  if (!formation.over.ok()) return;
  formation.over = reason;
  formation.cancelled = true;
  if (formation.communicator != nullptr) {
    formation.communicator->Abort(reason);
    options_.on_active(false);
  }
}

void Engine::Run() {
  while (true) {
    Task task;
    bool step = false;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || StepIsDue() || !tasks_.empty(); });
      if (stopping_) break;
      step = StepIsDue();
      if (!step) {
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
    }
    if (step) {
      StepJobs();
    } else {
      RunTask(task);
    }
  }
  DropAll();
}

void Engine::RunTask(const Task& task) {
  switch (task.message.kind_case()) {
    case v1::GroupMessage::kForm:
      Form(task);
      break;
    case v1::GroupMessage::kAbort:
      if (current_ != nullptr && current_->form.epoch() == task.message.abort().epoch()) DropAll();
      break;
    case v1::GroupMessage::kCommand: {
      v1::WorkerMessage answer;
      std::optional<v1::CommandResult> result = Execute(task.message.command());
      if (!result) break;
      *answer.mutable_result() = *std::move(result);
      options_.send(answer);
      break;
    }
    case v1::GroupMessage::KIND_NOT_SET:
      LogWarning("the coordinator sent a message that this version does not know");
      break;
  }
}

bool Engine::StepIsDue() const {
  if (models_ == nullptr || !models_->busy()) return false;
  // A dead group's jobs end at once; otherwise what was agreed on runs first.
  return !current_->over.ok() || next_ordinal_ > admitted_;
}

uint64_t Engine::NewestOrdinal() const {
  uint64_t newest = next_ordinal_ - 1;
  for (const Task& task : tasks_) {
    // Whatever else is waiting ends the epoch.
    if (!task.message.has_command() || task.message.command().ordinal() != newest + 1) break;
    ++newest;
  }
  return newest;
}

void Engine::StepJobs() {
  uint64_t newest = 0;
  absl::Status over;
  {
    const std::scoped_lock lock(mutex_);
    newest = NewestOrdinal();
    over = current_->over;
  }
  if (!over.ok()) return models_->FailAll(over);
  const absl::StatusOr<uint64_t> agreed = models_->Step(newest);
  if (agreed.ok()) {
    admitted_ = *agreed;
    return;
  }
  const absl::Status status = BrokenGroup(agreed.status());
  {
    const std::scoped_lock lock(mutex_);
    End(*current_, status);
  }
  models_->FailAll(status);
}

void Engine::Form(const Task& task) {
  DropAll();
  current_ = task.formation;
  next_ordinal_ = 1;
  const v1::FormGroup& form = current_->form;
  auto communicator = options_.connect(form, task.received + absl::Milliseconds(form.timeout_ms()));
  absl::Status status = communicator.status();
  {
    const std::scoped_lock lock(mutex_);
    if (status.ok()) status = current_->over;
    if (status.ok()) {
      current_->communicator = *std::move(communicator);
      options_.on_active(true);
    }
  }
  if (status.ok() && options_.model != nullptr) {
    ModelSessions::Options models;
    model_content_ =
        std::make_unique<ModelContent>(ModelContentOptions(options_.backend, options_.store, options_.model));
    models.content = model_content_.get();
    models.model = options_.model;
    models.group = current_->communicator.get();
    models.epoch = form.epoch();
    models.node = Placement::OfRanks(form.size()).nodes[form.rank()];
    models.send = options_.send;
    models_ = std::make_unique<ModelSessions>(std::move(models));
    admitted_ = 0;
  }
  if (!status.ok()) current_ = nullptr;

  v1::WorkerMessage answer;
  v1::GroupFormed& formed = *answer.mutable_formed();
  formed.set_epoch(form.epoch());
  formed.set_attempt(form.attempt());
  formed.set_code(static_cast<int>(status.code()));
  formed.set_message(std::string(status.message()));
  options_.send(answer);
}

void Engine::DropAll() {
  std::map<uint64_t, std::shared_ptr<StagedAppend>> appends;
  std::shared_ptr<Communicator> communicator;
  {
    const std::scoped_lock lock(mutex_);
    appends.swap(appends_);
    if (current_ != nullptr) {
      End(*current_, absl::AbortedError(absl::StrCat("epoch ", current_->form.epoch(), " is over")));
      communicator.swap(current_->communicator);
    }
  }
  // Aborted before the sessions go: uploads under way still look at them.
  for (const auto& [id, append] : appends) append->Abort();
  if (models_ != nullptr) models_->FailAll(absl::AbortedError("the epoch is over"));
  models_ = nullptr;
  model_content_ = nullptr;
  sessions_.clear();
  current_ = nullptr;
}

std::optional<v1::CommandResult> Engine::Execute(const v1::Command& command) {
  v1::CommandResult result;
  absl::Status status = CheckTurn(command);
  if (status.ok()) status = Dispatch(command, absl::Now() + absl::Milliseconds(command.timeout_ms()), result);
  if (status.ok() && IsJob(command)) return std::nullopt;
  if (status.ok() && result.ByteSizeLong() > static_cast<size_t>(kMessageBytesMax) - 1024) {
    status = absl::InternalError(absl::StrCat("the answer has ", result.ByteSizeLong(),
                                              " bytes, more than a message may; send smaller steps"));
  }
  if (!status.ok()) result.clear_kind();
  result.set_epoch(command.epoch());
  result.set_ordinal(command.ordinal());
  result.set_code(static_cast<int>(status.code()));
  result.set_message(std::string(status.message()));
  return result;
}

absl::Status Engine::CheckTurn(const v1::Command& command) {
  const std::scoped_lock lock(mutex_);
  if (current_ == nullptr || current_->form.epoch() != command.epoch()) {
    return absl::AbortedError(absl::StrCat("epoch ", command.epoch(), " is over or was never joined"));
  }
  if (!current_->over.ok()) return current_->over;
  if (command.ordinal() != next_ordinal_) {
    // A rank that missed a command would meet the others in the wrong collective.
    absl::Status status = absl::AbortedError(absl::StrCat(
        "command ", command.ordinal(), " came where ", next_ordinal_, " was due in epoch ", command.epoch()));
    End(*current_, status);
    return status;
  }
  ++next_ordinal_;
  return absl::OkStatus();
}

absl::Status Engine::Dispatch(const v1::Command& command, absl::Time deadline, v1::CommandResult& result) {
  switch (command.kind_case()) {
    case v1::Command::kOpenSession:
      return OpenSession(command.open_session());
    case v1::Command::kCloseSession:
      return CloseSession(command.close_session());
    case v1::Command::kBeginAppend:
      return BeginAppend(command.begin_append());
    case v1::Command::kSealAppend:
      return SealAppend(command.seal_append(), *result.mutable_seal());
    case v1::Command::kCommitAppend:
      return CommitAppend(command.commit_append());
    case v1::Command::kAbortAppend:
      return AbortAppend(command.abort_append());
    case v1::Command::kAttend:
      return Attend(command.attend(), deadline, *result.mutable_attend());
    case v1::Command::kModelAppend:
    case v1::Command::kModelGenerate:
    case v1::Command::kModelScore:
    case v1::Command::kModelEmbed: {
      EDUBA_ASSIGN_OR_RETURN(ModelSessions * models, Models());
      return models->Start(command);
    }
    case v1::Command::kCancelJob:
      if (models_ != nullptr) models_->Cancel(command.cancel_job().ordinal());
      return absl::OkStatus();
    case v1::Command::kForkSession: {
      EDUBA_ASSIGN_OR_RETURN(ModelSessions * models, Models());
      return models->Fork(command.fork_session());
    }
    case v1::Command::KIND_NOT_SET:
      break;
  }
  return absl::UnimplementedError(
      "this worker does not know the command; update it to the coordinator's version");
}

absl::StatusOr<ModelSessions*> Engine::Models() {
  if (models_ == nullptr) {
    return absl::FailedPreconditionError("this worker holds no model; start the workers with --model FOLDER");
  }
  return models_.get();
}

absl::Status Engine::OpenSession(const v1::OpenSession& request) {
  if (request.spec().has_model()) {
    EDUBA_ASSIGN_OR_RETURN(ModelSessions * models, Models());
    v1::OpenSession open = request;
    if (!open.has_placement()) {
      const Placement placement = Placement::OfRanks(current_->form.size(), request.spec().stripe_pages());
      open.mutable_placement()->set_version(placement.version);
      for (const std::string& node : placement.nodes) open.mutable_placement()->add_nodes(node);
      open.mutable_placement()->set_replicas(placement.replicas);
      open.mutable_placement()->set_stripe_pages(placement.stripe_pages);
    }
    return models->Open(open).status();
  }
  EDUBA_ASSIGN_OR_RETURN(SequenceSpec spec, SequenceSpecOf(request.spec()));
  auto& session = sessions_[request.session_id()];
  if (session != nullptr) {
    return absl::AlreadyExistsError(absl::StrCat("session ", request.session_id(), " is open already"));
  }
  session = std::make_unique<Sequence>(std::move(spec));
  return absl::OkStatus();
}

absl::Status Engine::CloseSession(const v1::CloseSession& request) {
  if (models_ != nullptr) models_->Close(request.session_id());
  const auto session = sessions_.find(request.session_id());
  if (session == sessions_.end()) return absl::OkStatus();
  std::vector<uint64_t> doomed;
  {
    const std::scoped_lock lock(mutex_);
    for (const auto& [id, append] : appends_) {
      if (&append->sequence() == session->second.get()) doomed.push_back(id);
    }
  }
  for (const uint64_t id : doomed) DropAppend(id);
  sessions_.erase(session);
  return absl::OkStatus();
}

absl::Status Engine::BeginAppend(const v1::BeginAppend& request) {
  const auto session = sessions_.find(request.session_id());
  if (session == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("session ", request.session_id(), " is not open on this worker"));
  }
  AppendShare share;
  share.at = request.at();
  share.count = request.count();
  share.compare_only = request.compare_only();
  for (const v1::Extent& extent : request.owned()) {
    share.owned.push_back({extent.first_position(), extent.first_position() + extent.count()});
  }
  if (FindAppend(request.append_id()).ok()) {
    return absl::AlreadyExistsError(absl::StrCat("append ", request.append_id(), " has begun already"));
  }
  EDUBA_ASSIGN_OR_RETURN(
      std::shared_ptr<StagedAppend> append,
      StagedAppend::Begin(options_.backend, options_.store, session->second.get(), std::move(share)));
  const std::scoped_lock lock(mutex_);
  appends_.emplace(request.append_id(), std::move(append));
  return absl::OkStatus();
}

absl::Status Engine::SealAppend(const v1::SealAppend& request, v1::SealResult& result) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  EDUBA_ASSIGN_OR_RETURN(const AppendSeal seal, append->Seal());
  result.set_digest_low(seal.digest.low);
  result.set_digest_high(seal.digest.high);
  result.set_exponents(BytesOf(seal.exponents));
  return absl::OkStatus();
}

absl::Status Engine::CommitAppend(const v1::CommitAppend& request) {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<StagedAppend> append, FindAppend(request.append_id()));
  std::vector<int16_t> exponents(request.exponents().size() / sizeof(int16_t));
  std::memcpy(exponents.data(), request.exponents().data(), exponents.size() * sizeof(int16_t));
  EDUBA_RETURN_IF_ERROR(append->Publish(std::move(exponents)));
  DropAppend(request.append_id());
  return absl::OkStatus();
}

absl::Status Engine::AbortAppend(const v1::AbortAppend& request) {
  DropAppend(request.append_id());
  return absl::OkStatus();
}

absl::Status Engine::Attend(const v1::AttendStep& request, absl::Time deadline, v1::AttendResult& result) {
  // Only this thread replaces it, so it stays while the step runs.
  Communicator& communicator = *current_->communicator;
  const auto session = sessions_.find(request.session_id());
  const int64_t length = session == sessions_.end() ? 0 : session->second->length();
  if (request.length() < 1 || request.length() > length) {
    // The other ranks may know the session and be on their way into the collective.
    absl::Status status =
        absl::AbortedError(absl::StrCat("step on ", request.length(), " positions of session ",
                                        request.session_id(), ", of which this worker knows ", length));
    communicator.Abort(status);
    return status;
  }
  const Sequence& sequence = *session->second;
  EDUBA_RETURN_IF_ERROR(CheckStep(request, sequence.spec()));

  AttentionQuery query;
  query.layer = request.layer();
  query.policy = request.policy() == v1::POLICY_WINDOW ? Policy::kWindow : Policy::kGlobal;
  query.length = request.length();
  query.queries = absl::MakeConstSpan(reinterpret_cast<const float*>(request.queries().data()),
                                      request.queries().size() / sizeof(float));
  query.positions = absl::MakeConstSpan(request.positions().data(), request.positions_size());
  query.first_row = request.first_row();
  query.cancelled = &current_->cancelled;
  const auto attended = AttendSharded(*options_.backend, communicator, sequence, query, deadline);
  if (absl::IsCancelled(attended.status())) {
    const std::scoped_lock lock(mutex_);
    return current_->over;
  }
  if (!attended.ok()) return BrokenGroup(attended.status());
  const AttentionAnswer& answer = *attended;
  if (communicator.rank() == 0) {
    result.set_outputs(BytesOf(answer.outputs));
    result.set_lse(BytesOf(answer.lse));
    result.set_sink_mass(BytesOf(answer.sink_mass));
    result.set_row_heads_maximum(BytesOf(answer.row_heads_maximum));
  }
  result.set_bytes_read(answer.bytes_read);
  result.set_collectives(answer.collectives);
  return absl::OkStatus();
}

void Engine::DropAppend(uint64_t append_id) {
  std::shared_ptr<StagedAppend> append;
  {
    const std::scoped_lock lock(mutex_);
    const auto found = appends_.find(append_id);
    if (found == appends_.end()) return;
    append = std::move(found->second);
    appends_.erase(found);
  }
  append->Abort();
}

absl::StatusOr<std::shared_ptr<StagedAppend>> Engine::FindAppend(uint64_t append_id) const {
  const std::scoped_lock lock(mutex_);
  const auto found = appends_.find(append_id);
  if (found == appends_.end()) {
    return absl::NotFoundError(
        absl::StrCat("append ", append_id,
                     " is not under way on this worker: it was committed, aborted, idle "
                     "for too long, or lost with its group; plan it again"));
  }
  return found->second;
}

}  // namespace eduba
