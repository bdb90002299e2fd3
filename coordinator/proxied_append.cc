#include "coordinator/proxied_append.h"

#include <string>
#include <utility>
#include <variant>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/unary_call.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// Takes a session's description, which the runtime gives at once.
class SessionTaker final : public Caller {
 public:
  void OnReply(absl::StatusOr<Answer> answer) override { answer_ = std::move(answer); }
  absl::StatusOr<v1::Session> Take() {
    EDUBA_CHECK(answer_.has_value());
    EDUBA_RETURN_IF_ERROR(answer_->status());
    return std::get<v1::Session>(**std::move(answer_));
  }

 private:
  std::optional<absl::StatusOr<Answer>> answer_;
};

absl::StatusOr<v1::Session> GetSession(Runtime* runtime, const std::string& name) {
  v1::GetSessionRequest get;
  get.set_name(name);
  SessionTaker taker;
  runtime->Start(&taker, [&get](ClusterState& state, RequestId id, int64_t) { state.GetSession(id, get); });
  return taker.Take();
}

}  // namespace

ProxiedAppend* ProxiedAppend::Start(Runtime* runtime, grpc::CallbackServerContext* context,
                                    grpc::ByteBuffer* response) {
  const std::shared_ptr<ProxiedAppend> append(new ProxiedAppend(runtime, context, response));
  append->self_ = append;
  // Once a read has been started, reactions come on other threads.
  const MutexLock lock(append->mutex_);
  append->StartRead(&append->bytes_);
  return append.get();
}

void ProxiedAppend::OnReadDone(bool ok) {
  bool first = false;
  {
    const MutexLock lock(mutex_);
    if (phase_ == Phase::kEnded || !failure_.ok()) return;
    first = phase_ == Phase::kFirstMessage;
  }
  absl::Status status;
  if (first) {
    status = Plan(ok);
  } else if (ok) {
    status = Forward();
  } else if (context_->IsCancelled()) {
    status = CallerGone();  // A client that went away in the middle ends its stream the same way.
  } else {
    ProxiedUpload* upload = nullptr;
    {
      const MutexLock lock(mutex_);
      upload = upload_.get();
    }
    if (upload == nullptr) return Commit();
    upload->Finish([self = shared_from_this()](const absl::Status& uploaded) { self->Uploaded(uploaded); });
  }
  if (!status.ok()) Fail(status);
}

absl::Status ProxiedAppend::Plan(bool read) {
  v1::AppendRequest message;
  if (read) EDUBA_RETURN_IF_ERROR(Decode(&bytes_, &message));
  if (!message.has_plan()) return absl::InvalidArgumentError("the first message of Append must be `plan`");
  {
    const MutexLock lock(mutex_);
    session_ = message.plan().session();
  }
  Ask(Phase::kPlan, [&message](ClusterState& state, RequestId id, int64_t now) {
    state.PlanAppend(id, message.plan(), now);
  });
  return absl::OkStatus();
}

absl::Status ProxiedAppend::Forward() {
  v1::AppendRequest message;
  EDUBA_RETURN_IF_ERROR(Decode(&bytes_, &message));
  if (!message.has_piece()) {
    return absl::InvalidArgumentError("every message of Append after the first must be `piece`");
  }
  ProxiedUpload* upload = nullptr;
  std::string name;
  {
    const MutexLock lock(mutex_);
    upload = upload_.get();
    name = session_;
  }
  if (upload == nullptr) {
    EDUBA_ASSIGN_OR_RETURN(const v1::Session session, GetSession(runtime_, name));
    const MutexLock lock(mutex_);
    if (!failure_.ok()) return failure_;
    upload_ = std::make_unique<ProxiedUpload>(context_, session.spec(), *plan_);
    upload = upload_.get();
  }
  upload->Send(message.piece(), [self = shared_from_this()](const absl::Status& sent) {
    if (!sent.ok()) return self->Fail(sent);
    const MutexLock lock(self->mutex_);
    if (self->failure_.ok()) self->StartRead(&self->bytes_);
  });
  return absl::OkStatus();
}

void ProxiedAppend::Uploaded(const absl::Status& status) {
  if (!status.ok()) return Fail(status);
  Commit();
}

void ProxiedAppend::Commit() {
  uint64_t append_id = 0;
  {
    const MutexLock lock(mutex_);
    if (!failure_.ok()) return;
    append_id = plan_->append_id();
  }
  Ask(Phase::kCommit, [append_id](ClusterState& state, RequestId id, int64_t now) {
    state.CommitAppend(id, append_id, now);
  });
}

void ProxiedAppend::Ask(Phase phase, const Runtime::Event& event) {
  {
    const MutexLock lock(mutex_);
    if (!failure_.ok()) return;
    phase_ = phase;
    asking_ = true;
  }
  const RequestId id = runtime_->Start(this, event);
  {
    const MutexLock lock(mutex_);
    request_ = id;
    asking_ = false;
    // A failure that came meanwhile is ours to see to, unless the answer has done so. The answer may have
    // come before this, and the next message after it, so the phase may be a later one.
    if (failure_.ok() || phase_ == Phase::kAbort || phase_ == Phase::kEnded) return;
  }
  Unwind(id);
}

void ProxiedAppend::OnReply(absl::StatusOr<Answer> answer) {
  const MutexLock lock(mutex_);
  switch (phase_) {
    case Phase::kPlan:
      if (!answer.ok()) return End(failure_.ok() ? answer.status() : failure_);
      plan_ = std::get<v1::AppendPlan>(*std::move(answer));
      if (!failure_.ok()) return;  // Unwind aborts it.
      phase_ = Phase::kPieces;
      return StartRead(&bytes_);
    case Phase::kCommit:
      if (answer.ok()) {
        *response_ = EncodeAnswer(*answer);
        return End(absl::OkStatus());
      }
      if (!failure_.ok()) return;  // Unwind aborts it.
      failure_ = answer.status();
      phase_ = Phase::kAbort;
      return later_.Set(absl::ToChronoTime(absl::Now()), [this](bool) { Abort(); });
    case Phase::kAbort:
      return End(failure_);
    case Phase::kFirstMessage:
    case Phase::kPieces:
    case Phase::kEnded:
      return;
  }
}

void ProxiedAppend::Fail(const absl::Status& status) {
  RequestId request = 0;
  {
    const MutexLock lock(mutex_);
    if (!failure_.ok() || phase_ == Phase::kEnded) return;
    failure_ = status;
    if (asking_) return;  // Ask goes on.
    request = request_;
  }
  Unwind(request);
}

void ProxiedAppend::Unwind(RequestId request) {
  runtime_->Cancel(request);
  // No reply of that request comes any more.
  ProxiedUpload* upload = nullptr;
  {
    const MutexLock lock(mutex_);
    upload = upload_.get();
  }
  if (upload == nullptr) return Abort();
  upload->Cancel([self = shared_from_this()](const absl::Status&) { self->Abort(); });
}

void ProxiedAppend::Abort() {
  uint64_t append_id = 0;
  {
    const MutexLock lock(mutex_);
    if (phase_ == Phase::kEnded || std::exchange(aborting_, true)) return;
    if (!plan_.has_value()) return End(failure_);
    phase_ = Phase::kAbort;
    append_id = plan_->append_id();
  }
  // The call may have ended when this returns.
  runtime_->Start(this, [append_id](ClusterState& state, RequestId id, int64_t now) {
    state.AbortAppend(id, append_id, now);
  });
}

void ProxiedAppend::End(const absl::Status& status) {
  phase_ = Phase::kEnded;
  Finish(ToGrpc(status));
}

void ProxiedAppend::OnCancel() { Fail(CallerGone()); }

void ProxiedAppend::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  self_.reset();
}

}  // namespace eduba
