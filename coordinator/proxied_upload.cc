#include "coordinator/proxied_upload.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/elements.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "rpc/channel.h"
#include "rpc/spec.h"
#include "rpc/status.h"

namespace eduba {

absl::StatusOr<std::vector<RoutedPiece>> RoutePiece(const v1::SessionSpec& spec, const v1::AppendPlan& plan,
                                                    const v1::UploadRequest& piece) {
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, DTypeFromProto(piece.dtype()));
  const RowBytes row = RowBytesOf(dtype, spec.kv_heads(), spec.head_dim(), spec.value_dim());
  const int64_t key_bytes = row.keys;
  const int64_t value_bytes = row.values;
  const int64_t first = piece.first_position();
  const int64_t count = piece.count();
  if (count < 1 || first < plan.at() || count > plan.at() + plan.count() - first) {
    return absl::InvalidArgumentError(absl::StrCat("a piece of ", count, " positions at ", first,
                                                   " does not lie in the append [", plan.at(), ", ",
                                                   plan.at() + plan.count(), ")"));
  }
  if (piece.layer() < 0 || piece.layer() >= spec.layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", piece.layer(), ", wanted 0 to ", spec.layers() - 1));
  }
  if (static_cast<int64_t>(piece.keys().size()) != count * key_bytes ||
      static_cast<int64_t>(piece.values().size()) != count * value_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a piece of ", count, " positions has ", piece.keys().size(), " bytes of keys and ",
                     piece.values().size(), " of values, wanted ", count * key_bytes, " and ",
                     count * value_bytes, " (", DTypeName(dtype), ")"));
  }
  std::vector<RoutedPiece> routed;
  const auto route = [&](int worker, PositionRange range) {
    RoutedPiece& part = routed.emplace_back();
    part.worker = worker;
    part.piece.set_append_id(plan.append_id());
    part.piece.set_layer(piece.layer());
    part.piece.set_first_position(range.begin);
    part.piece.set_count(static_cast<int32_t>(range.size()));
    part.piece.set_dtype(piece.dtype());
    part.piece.set_keys(piece.keys().substr((range.begin - first) * key_bytes, range.size() * key_bytes));
    part.piece.set_values(
        piece.values().substr((range.begin - first) * value_bytes, range.size() * value_bytes));
  };
  const PositionRange whole{first, first + count};
  // The first extent that does not end before the piece.
  auto extent =
      std::partition_point(plan.extents().begin(), plan.extents().end(),
                           [first](const v1::Extent& e) { return e.first_position() + e.count() <= first; });
  for (; extent != plan.extents().end() && extent->first_position() < whole.end; ++extent) {
    const PositionRange own =
        whole.Intersect({extent->first_position(), extent->first_position() + extent->count()});
    route(extent->worker(), own);
    const PositionRange replicated = own.Intersect({0, plan.replicate_below()});
    for (int worker = 0; !replicated.empty() && worker < plan.workers_size(); ++worker) {
      if (worker != extent->worker()) route(worker, replicated);
    }
  }
  return routed;
}

// The upload to one worker. All but what gRPC holds while a call is open is guarded by the owner's mutex. The
// call is held (AddHold) as long as parts may follow: that the worker has ended its stream early is noticed
// at the next part, or at the end.
struct ProxiedUpload::Stream final : public grpc::ClientWriteReactor<v1::UploadRequest> {
  Stream(ProxiedUpload* upload, std::string worker_address)
      : owner(upload), address(std::move(worker_address)) {}

  void OnWriteDone(bool ok) override { owner->PartSent(*this, ok); }
  void OnDone(const grpc::Status& status) override { owner->Ended(*this, FromGrpc(status)); }
  void ReleaseHold() {
    if (std::exchange(held, false)) RemoveHold();
  }

  ProxiedUpload* const owner;
  const std::string address;
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<v1::Pages::Stub> stub;
  v1::UploadResponse response;
  std::deque<v1::UploadRequest> parts;  // of one piece; the front is being written
  int64_t sent = 0;                     // positions
  int attempts = 0;
  bool open = false;
  bool held = false;
  bool closed = false;  // no more parts will come
};

ProxiedUpload::ProxiedUpload(const grpc::CallbackServerContext* call, v1::SessionSpec spec,
                             v1::AppendPlan plan)
    : call_(call), spec_(std::move(spec)), plan_(std::move(plan)), streams_(plan_.workers_size()) {}

ProxiedUpload::~ProxiedUpload() = default;

void ProxiedUpload::Send(const v1::UploadRequest& piece, Callback sent) {
  absl::StatusOr<std::vector<RoutedPiece>> routed = RoutePiece(spec_, plan_, piece);
  if (!routed.ok()) return sent(routed.status());
  {
    const MutexLock lock(mutex_);
    if (failure_.ok()) {
      unsent_parts_ = static_cast<int>(routed->size());
      sent_ = std::move(sent);
      for (RoutedPiece& part : *routed) Push(part.worker, std::move(part.piece));
      return;
    }
    routed = failure_;
  }
  sent(routed.status());
}

void ProxiedUpload::Push(int worker, v1::UploadRequest part) {
  std::unique_ptr<Stream>& stream = streams_[worker];
  if (stream == nullptr) {
    stream = std::make_unique<Stream>(this, plan_.workers(worker));
    Open(*stream);
  }
  stream->parts.push_back(std::move(part));
  if (stream->parts.size() == 1) stream->StartWrite(&stream->parts.front());
}

void ProxiedUpload::Open(Stream& stream) {
  if (!stream.open) ++open_streams_;
  stream.open = true;
  ++stream.attempts;
  stream.context = grpc::ClientContext::FromCallbackServerContext(*call_);
  stream.stub = v1::Pages::NewStub(OpenChannel(stream.address));
  stream.stub->async()->Upload(stream.context.get(), &stream.response, &stream);
  stream.held = true;
  stream.AddHold();
  stream.StartCall();
}

void ProxiedUpload::Finish(Callback done) {
  std::vector<std::function<void()>> due;
  {
    const MutexLock lock(mutex_);
    finished_ = std::move(done);
    for (const auto& stream : streams_) {
      if (stream == nullptr || !stream->held) continue;
      stream->closed = true;
      stream->StartWritesDone();
      stream->ReleaseHold();
    }
    due = TakeDue();
  }
  for (const auto& call : due) call();
}

void ProxiedUpload::Cancel(Callback done) {
  std::vector<std::function<void()>> due;
  {
    const MutexLock lock(mutex_);
    cancelled_ = std::move(done);
    if (failure_.ok()) failure_ = CallerGone();
    for (const auto& stream : streams_) {
      if (stream == nullptr || !stream->open) continue;
      stream->context->TryCancel();
      stream->ReleaseHold();
    }
    due = TakeDue();
  }
  for (const auto& call : due) call();
}

void ProxiedUpload::PartSent(Stream& stream, bool ok) {
  std::vector<std::function<void()>> due;
  {
    const MutexLock lock(mutex_);
    if (!ok) return stream.ReleaseHold();  // The stream has ended; Ended hears why.
    stream.sent += stream.parts.front().count();
    stream.parts.pop_front();
    --unsent_parts_;
    if (!stream.parts.empty()) stream.StartWrite(&stream.parts.front());
    due = TakeDue();
  }
  for (const auto& call : due) call();
}

void ProxiedUpload::Ended(Stream& stream, const absl::Status& status) {
  std::vector<std::function<void()>> due;
  {
    const MutexLock lock(mutex_);
    // A second attempt where nothing has been sent, because older gRPC may take a connection under way for
    // one that failed. (Connect of rpc/channel.h says more; it would block here.)
    if (absl::IsUnavailable(status) && failure_.ok() && stream.attempts == 1 && !stream.parts.empty() &&
        stream.sent == 0) {
      Open(stream);
      return stream.StartWrite(&stream.parts.front());
    }
    stream.open = false;
    --open_streams_;
    if (failure_.ok()) failure_ = Result(stream, status);
    due = TakeDue();
  }
  // The last of them may destroy the upload, and the stream with it.
  for (const auto& call : due) call();
}

absl::Status ProxiedUpload::Result(const Stream& stream, const absl::Status& status) {
  const std::string worker = absl::StrCat("worker ", stream.address);
  EDUBA_RETURN_IF_ERROR(Annotate(status, worker));
  if (!stream.closed) return absl::InternalError(absl::StrCat(worker, " ended its upload stream early"));
  if (stream.response.positions() == stream.sent) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(worker, " received ", stream.response.positions(), " positions of ",
                                          stream.sent, " sent"));
}

std::vector<std::function<void()>> ProxiedUpload::TakeDue() {
  std::vector<std::function<void()>> due;
  const auto take = [&due](Callback& callback, const absl::Status& status) {
    if (callback != nullptr)
      due.push_back([call = std::exchange(callback, nullptr), status] { call(status); });
  };
  if (!failure_.ok() || unsent_parts_ == 0) take(sent_, failure_);
  if (open_streams_ > 0) return due;
  take(finished_, failure_);
  take(cancelled_, absl::CancelledError("the upload was cancelled"));
  return due;
}

}  // namespace eduba
