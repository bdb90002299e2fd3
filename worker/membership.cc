#include "worker/membership.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {

Membership::Membership(v1::FormGroup form, std::function<void(bool)> on_active)
    : form_(std::move(form)), on_active_(std::move(on_active)) {}

Membership::~Membership() { End(absl::AbortedError(absl::StrCat("epoch ", epoch(), " is over"))); }

absl::Status Membership::Connect(const ConnectGroup& connect, absl::Time deadline) {
  if (form_.rank() < 0 || form_.rank() >= form_.size() || form_.nodes_size() != form_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", form_.rank(), " of a group of ", form_.size(),
                                                   " in which ", form_.nodes_size(), " nodes have names"));
  }
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> communicator, connect(form_, deadline));
  const MutexLock lock(mutex_);
  if (!over_.ok()) return over_;
  communicator_ = std::move(communicator);
  group_ = communicator_.get();
  on_active_(true);
  return absl::OkStatus();
}

void Membership::StartModels(NodeContent* content, ModelSessions::SendMessage send) {
  if (content->models() == nullptr) return;
  ModelSessions::Options options;
  options.content = content->models();
  options.tokens = content->stored_tokens();
  options.model = content->model();
  options.group = group_;
  options.epoch = epoch();
  options.node = node();
  options.send = std::move(send);
  models_ = std::make_unique<ModelSessions>(std::move(options));
}

absl::StatusOr<ModelSessions*> Membership::Models() {
  if (models_ == nullptr) {
    return absl::FailedPreconditionError("this worker holds no model; start the workers with --model FOLDER");
  }
  return models_.get();
}

void Membership::FailJobs(const absl::Status& status) {
  if (models_ != nullptr) models_->FailAll(status);
}

absl::Status Membership::TakeTurn(const v1::Command& command) {
  EDUBA_RETURN_IF_ERROR(over());
  if (command.ordinal() != next_ordinal_) {
    absl::Status status = absl::AbortedError(absl::StrCat(
        "command ", command.ordinal(), " came where ", next_ordinal_, " was due in epoch ", command.epoch()));
    End(status);
    return status;
  }
  ++next_ordinal_;
  return absl::OkStatus();
}

absl::Status Membership::EndIfBroken(absl::Status status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
      return status;
    default:
      End(status);
      return status;
  }
}

void Membership::End(const absl::Status& reason) {
  const MutexLock lock(mutex_);
  if (!over_.ok()) return;
  over_ = reason;
  cancelled_ = true;
  if (communicator_ == nullptr) return;
  communicator_->Abort(reason);
  on_active_(false);
}

absl::Status Membership::over() const {
  const MutexLock lock(mutex_);
  return over_;
}

}  // namespace eduba
