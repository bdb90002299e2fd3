#include "coordinator/append_tokens_stream.h"

#include <algorithm>
#include <utility>
#include <variant>
#include <vector>

#include "base/status_macros.h"
#include "base/wire_array.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {

AppendTokensStream::AppendTokensStream(Runtime* runtime, grpc::CallbackServerContext* context,
                                       grpc::ByteBuffer* response)
    : runtime_(runtime), context_(context), response_(response) {
  // Once a read has been started, reactions come on other threads.
  const MutexLock lock(mutex_);
  StartRead(&bytes_);
}

void AppendTokensStream::OnReadDone(bool ok) {
  absl::Status status;
  if (ok) {
    v1::AppendTokensRequest request;
    status = Decode(&bytes_, &request);
    if (status.ok()) status = Submit(request);
    if (status.ok()) return;
  }
  const MutexLock lock(mutex_);
  if (finished_) return;
  if (!status.ok()) return End(status);
  // A client that went away in the middle ends its stream the same way.
  if (context_->IsCancelled()) return End(CallerGone());
  if (first_) return End(absl::InvalidArgumentError("AppendTokens has no message"));
  *response_ = Encode(total_);
  End(absl::OkStatus());
}

absl::Status AppendTokensStream::Submit(const v1::AppendTokensRequest& request) {
  std::string session;
  std::optional<int64_t> at;
  {
    const MutexLock lock(mutex_);
    if (cancelled_) return CallerGone();
    if (first_) {
      session_ = request.session();
      if (request.has_at()) at_ = request.at();
    } else if (!request.session().empty() || request.has_at()) {
      return absl::InvalidArgumentError("only the first message of AppendTokens has session and at");
    }
    session = session_;
    at = at_;
  }
  EDUBA_ASSIGN_OR_RETURN(std::vector<int32_t> ids, NumbersOf<int32_t>(request.ids(), "ids"));
  const RequestId id = runtime_->Start(this, [&](ClusterState& state, RequestId own, int64_t now) {
    state.AppendTokens(own, session, at, std::move(ids), now);
  });
  bool cancelled = false;
  {
    const MutexLock lock(mutex_);
    // The answer may have come already, and with it the next message on another thread.
    id_ = std::max(id_, id);
    cancelled = cancelled_;
  }
  // OnCancel came before there was a request to cancel.
  if (cancelled) runtime_->Cancel(id);
  return absl::OkStatus();
}

void AppendTokensStream::OnReply(absl::StatusOr<Answer> answer) {
  const MutexLock lock(mutex_);
  if (finished_) return;
  if (!answer.ok()) return End(answer.status());
  const auto& receipt = std::get<v1::AppendTokensReceipt>(*answer);
  if (first_) total_.set_at(receipt.at());
  first_ = false;
  total_.set_count(total_.count() + receipt.count());
  total_.set_length(receipt.length());
  total_.set_already_stored(total_.already_stored() + receipt.already_stored());
  at_ = receipt.at() + receipt.count();
  StartRead(&bytes_);
}

void AppendTokensStream::OnCancel() {
  RequestId id = 0;
  {
    const MutexLock lock(mutex_);
    cancelled_ = true;
    id = id_;
  }
  if (id != 0) runtime_->Cancel(id);
  const MutexLock lock(mutex_);
  if (!finished_) End(CallerGone());
}

void AppendTokensStream::End(const absl::Status& status) {
  finished_ = true;
  Finish(ToGrpc(status));
}

void AppendTokensStream::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  delete this;
}

}  // namespace eduba
