#include "worker/command_loop.h"

#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/placement.h"
#include "base/status_macros.h"
#include "rpc/limits.h"
#include "worker/attend_step.h"
#include "worker/own_placement.h"

namespace eduba {

CommandLoop::CommandLoop(Options options)
    : options_(std::move(options)), tensors_(options_.content->tensors()), thread_([this] { Run(); }) {}

CommandLoop::~CommandLoop() { Stop(); }

void CommandLoop::Handle(v1::GroupMessage message) {
  const MutexLock lock(mutex_);
  auto task = std::make_shared<Task>();
  task->received = absl::Now();
  if (message.has_form()) {
    if (latest_ != nullptr) {
      latest_->End(absl::AbortedError(
          absl::StrCat("epoch ", latest_->epoch(), " is over: epoch ", message.form().epoch(), " begins")));
    }
    latest_ = std::make_shared<Membership>(message.form(), options_.on_active);
    task->membership = latest_;
  } else if (message.has_abort() && latest_ != nullptr && latest_->epoch() == message.abort().epoch()) {
    latest_->End(absl::AbortedError(
        absl::StrCat("epoch ", message.abort().epoch(), " is over: ", message.abort().reason())));
  }
  task->message = std::move(message);
  tasks_.push_back(std::move(task));
  changed_.NotifyOne();
}

void CommandLoop::Stop() {
  {
    const MutexLock lock(mutex_);
    if (latest_ != nullptr) latest_->End(absl::AbortedError("the worker has left its coordinator"));
    stopping_ = true;
    changed_.NotifyOne();
  }
  if (thread_.joinable()) thread_.join();
}

void CommandLoop::Run() {
  std::shared_ptr<Task> task;
  std::vector<v1::WorkerMessage> synced;
  while (NextTask(task, synced)) {
    if (!synced.empty()) {
      for (v1::WorkerMessage& answer : synced) Send(std::move(answer));
    } else if (task == nullptr) {
      StepJobs();
    } else {
      RunTask(*task);
    }
  }
  LeaveGroup();
}

bool CommandLoop::NextTask(std::shared_ptr<Task>& task, std::vector<v1::WorkerMessage>& synced) {
  const MutexLock lock(mutex_);
  while (!stopping_ && synced_.empty() && !StepIsDue() && tasks_.empty()) changed_.Wait(mutex_);
  if (stopping_) return false;
  task = nullptr;
  synced = std::exchange(synced_, {});
  if (!synced.empty() || StepIsDue()) return true;
  task = std::move(tasks_.front());
  tasks_.pop_front();
  return true;
}

bool CommandLoop::StepIsDue() const {
  if (membership_ == nullptr || !membership_->busy()) return false;
  // A dead group's jobs end at once; otherwise what was agreed on runs first.
  return !membership_->over().ok() || membership_->next_ordinal() > admitted_;
}

uint64_t CommandLoop::NewestOrdinal() const {
  uint64_t newest = membership_->next_ordinal() - 1;
  for (const auto& task : tasks_) {
    // Whatever else is waiting ends the epoch.
    if (!task->message.has_command() || task->message.command().ordinal() != newest + 1) break;
    ++newest;
  }
  return newest;
}

void CommandLoop::StepJobs() {
  uint64_t newest = 0;
  {
    const MutexLock lock(mutex_);
    newest = NewestOrdinal();
  }
  absl::Status status = membership_->over();
  if (status.ok()) {
    const absl::StatusOr<uint64_t> agreed = (*membership_->Models())->Step(newest);
    if (agreed.ok()) {
      admitted_ = *agreed;
      return;
    }
    status = BrokenGroup(agreed.status());
    // Whatever the code: a step says only of its own jobs what is wrong with them.
    membership_->End(status);
  }
  membership_->FailJobs(status);
}

void CommandLoop::RunTask(const Task& task) {
  switch (task.message.kind_case()) {
    case v1::GroupMessage::kForm:
      Form(task);
      break;
    case v1::GroupMessage::kAbort:
      if (membership_ != nullptr && membership_->epoch() == task.message.abort().epoch()) LeaveGroup();
      break;
    case v1::GroupMessage::kCommand:
      Execute(task.message.command());
      break;
    case v1::GroupMessage::KIND_NOT_SET:
      LogWarning("the coordinator sent a message that this version does not know");
      break;
  }
}

void CommandLoop::Form(const Task& task) {
  LeaveGroup();
  const v1::FormGroup& form = task.membership->form();
  absl::Status status =
      options_.content->EnterCluster(form.cluster(), form.lasting(), {form.term(), form.term_nonce()});
  if (status.ok()) {
    status =
        task.membership->Connect(options_.connect, task.received + absl::Milliseconds(form.timeout_ms()));
  }
  if (status.ok()) {
    membership_ = task.membership;
    membership_->StartModels(options_.content, [this](const v1::WorkerMessage& message,
                                                      const std::shared_ptr<FrameLog>& unsynced) {
      if (unsynced != nullptr) return SendWhenSynced(unsynced, message);
      Send(message);
    });
    admitted_ = 0;
  }
  v1::WorkerMessage answer;
  v1::GroupFormed& formed = *answer.mutable_formed();
  formed.set_epoch(form.epoch());
  formed.set_attempt(form.attempt());
  formed.set_code(static_cast<int>(status.code()));
  formed.set_message(std::string(status.message()));
  Send(std::move(answer));
}

void CommandLoop::LeaveGroup() {
  if (membership_ != nullptr) {
    membership_->End(absl::AbortedError(absl::StrCat("epoch ", membership_->epoch(), " is over")));
    membership_->FailJobs(membership_->over());
    const MutexLock lock(mutex_);
    if (latest_ == membership_) latest_ = nullptr;
  }
  tensors_.DropUnsealed();
  membership_ = nullptr;
}

void CommandLoop::Execute(const v1::Command& command) {
  v1::WorkerMessage answer;
  v1::CommandResult& result = *answer.mutable_result();
  bool is_job = false;
  std::shared_ptr<FrameLog> unsynced;
  absl::Status status;
  if (membership_ == nullptr || membership_->epoch() != command.epoch()) {
    status = absl::AbortedError(absl::StrCat("epoch ", command.epoch(), " is over or was never joined"));
  } else {
    status = membership_->TakeTurn(command);
  }
  if (status.ok()) status = Dispatch(command, result, is_job, unsynced);
  if (status.ok() && is_job) return;
  if (status.ok() && result.ByteSizeLong() > static_cast<size_t>(kMessageBytesMax) - 1024) {
    status = absl::InternalError(absl::StrCat("the answer has ", result.ByteSizeLong(),
                                              " bytes, more than a message may; send smaller steps"));
  }
  if (!status.ok()) result.clear_kind();
  result.set_epoch(command.epoch());
  result.set_ordinal(command.ordinal());
  result.set_code(static_cast<int>(status.code()));
  result.set_message(std::string(status.message()));
  if (status.ok() && unsynced != nullptr) return SendWhenSynced(std::move(unsynced), std::move(answer));
  Send(std::move(answer));
}

void CommandLoop::SendWhenSynced(std::shared_ptr<FrameLog> log, v1::WorkerMessage answer) {
  syncer_.Sync(std::move(log), [this, answer = std::move(answer)] {
    const MutexLock lock(mutex_);
    synced_.push_back(answer);
    changed_.NotifyOne();
  });
}

void CommandLoop::Send(v1::WorkerMessage message) {
  if (message.has_result()) {
    const bool in_epoch = membership_ != nullptr && membership_->epoch() == message.result().epoch();
    message.mutable_result()->set_ends_group(!in_epoch || !membership_->over().ok());
  }
  options_.send(message);
}

absl::Status CommandLoop::Dispatch(const v1::Command& command, v1::CommandResult& result, bool& is_job,
                                   std::shared_ptr<FrameLog>& unsynced) {
  switch (command.kind_case()) {
    case v1::Command::kRetainSessions:
      return RetainSessions(command.retain_sessions());
    case v1::Command::kOpenSession:
      return OpenSession(command.open_session(), *result.mutable_content());
    case v1::Command::kCloseSession:
      return CloseSession(command.close_session());
    case v1::Command::kSettleSession: {
      const auto models = membership_->Models();
      if (models.ok() && (*models)->IsJob(command)) return DispatchToModels(command, is_job);
      return tensors_.Settle(command.settle_session());
    }
    case v1::Command::kBeginAppend:
    case v1::Command::kSealAppend:
    case v1::Command::kCommitAppend:
    case v1::Command::kAbortAppend:
    case v1::Command::kAttend:
      return DispatchToTensors(command, result, unsynced);
    case v1::Command::kModelAppend:
    case v1::Command::kModelGenerate:
    case v1::Command::kModelScore:
    case v1::Command::kModelEmbed:
    case v1::Command::kCancelJob:
    case v1::Command::kForkSession:
      return DispatchToModels(command, is_job);
    case v1::Command::KIND_NOT_SET:
      break;
  }
  return absl::UnimplementedError(
      "this worker does not know the command; update it to the coordinator's version");
}

absl::Status CommandLoop::DispatchToTensors(const v1::Command& command, v1::CommandResult& result,
                                            std::shared_ptr<FrameLog>& unsynced) {
  switch (command.kind_case()) {
    case v1::Command::kBeginAppend:
      return tensors_.BeginAppend(command.begin_append());
    case v1::Command::kSealAppend: {
      EDUBA_ASSIGN_OR_RETURN(TensorContent::Sealed sealed, tensors_.SealAppend(command.seal_append()));
      *result.mutable_seal() = std::move(sealed.result);
      unsynced = std::move(sealed.frames);
      return absl::OkStatus();
    }
    case v1::Command::kCommitAppend:
      return tensors_.CommitAppend(command.commit_append());
    case v1::Command::kAbortAppend:
      tensors_.AbortAppend(command.abort_append().append_id());
      return absl::OkStatus();
    default: {
      EDUBA_ASSIGN_OR_RETURN(
          *result.mutable_attend(),
          Attend(*options_.backend, *membership_, tensors_.Find(command.attend().session_id()),
                 command.attend(), absl::Now() + absl::Milliseconds(command.timeout_ms())));
      return absl::OkStatus();
    }
  }
}

absl::Status CommandLoop::DispatchToModels(const v1::Command& command, bool& is_job) {
  const auto models = membership_->Models();
  if (command.has_cancel_job()) {
    if (models.ok()) (*models)->Cancel(command.cancel_job().ordinal());
    return absl::OkStatus();
  }
  EDUBA_RETURN_IF_ERROR(models.status());
  if (command.has_fork_session()) return (*models)->Fork(command.fork_session());
  is_job = true;
  return membership_->EndIfBroken((*models)->Start(command));
}

absl::Status CommandLoop::RetainSessions(const v1::RetainSessions& request) {
  const std::set<uint64_t> ids(request.session_ids().begin(), request.session_ids().end());
  options_.content->RetainUnreadable(ids);
  tensors_.Retain(ids);
  const auto models = membership_->Models();
  if (models.ok()) (*models)->Retain(request);
  return absl::OkStatus();
}

absl::Status CommandLoop::OpenSession(const v1::OpenSession& request, v1::SessionContent& content) {
  EDUBA_RETURN_IF_ERROR(options_.content->CheckReadable(request.session_id()));
  if (request.spec().has_model()) {
    EDUBA_ASSIGN_OR_RETURN(ModelSessions * models, membership_->Models());
    EDUBA_ASSIGN_OR_RETURN(content, models->Open(request));
    return absl::OkStatus();
  }
  const v1::FormGroup& form = membership_->form();
  EDUBA_ASSIGN_OR_RETURN(const Placement placement,
                         OwnPlacement(request.placement(), membership_->node(), form.rank(), form.size()));
  EDUBA_ASSIGN_OR_RETURN(content, tensors_.Open(request, placement));
  return absl::OkStatus();
}

absl::Status CommandLoop::CloseSession(const v1::CloseSession& request) {
  const auto models = membership_->Models();
  if (models.ok()) (*models)->Close(request.session_id());
  tensors_.Close(request.session_id());
  options_.content->CloseUnreadable(request.session_id());
  return absl::OkStatus();
}

}  // namespace eduba
