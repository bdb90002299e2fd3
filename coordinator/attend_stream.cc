#include "coordinator/attend_stream.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/dtype.h"
#include "base/elements.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// How many bytes of queries or answers one call may have in our memory: enough for the steps that are under
// way and the next, little enough for hundreds of calls.
constexpr int64_t kCallBytesMax = 4 << 20;

}  // namespace

absl::Status CheckFiniteQueries(const std::string& queries, const v1::SessionSpec& spec, int64_t first_row) {
  const auto elements = static_cast<int64_t>(queries.size() / sizeof(float));
  const int64_t i = FirstNonFinite(queries.data(), DType::kF32, elements);
  if (i < 0) return absl::OkStatus();
  const int64_t row = i / (int64_t{spec.query_heads()} * spec.head_dim());
  const int64_t head = i / spec.head_dim() % spec.query_heads();
  const bool is_nan = std::isnan(LoadElement(queries.data(), DType::kF32, i));
  return absl::InvalidArgumentError(absl::StrCat("query row ", first_row + row, ", head ", head, ", index ",
                                                 i % spec.head_dim(), " is ", is_nan ? "NaN" : "Inf",
                                                 ", wanted finite numbers; replace it and ask again"));
}

AttendStream::AttendStream(Runtime* runtime) : runtime_(runtime), start_(absl::Now()) {
  // Once a read has been started, reactions come on other threads.
  const MutexLock lock(mutex_);
  StartRead(&bytes_);
}

void AttendStream::OnReadDone(bool ok) {
  RequestId id = 0;
  std::shared_ptr<const v1::SessionSpec> spec;
  {
    const MutexLock lock(mutex_);
    if (!ok) read_all_ = true;
    if (finished_ || ending_) return;
    id = id_;
    spec = spec_;
  }
  if (ok) {
    const absl::Status decoded = Decode(&bytes_, &incoming_);
    if (!decoded.ok()) return Fail(decoded);
  }
  if (id == 0) return Begin(ok);
  if (!ok) {
    runtime_->Continue(
        id, [](ClusterState& state, RequestId request, int64_t now) { state.FinishRows(request, now); });
    return;
  }
  if (!incoming_.has_rows()) {
    return Fail(absl::InvalidArgumentError("every message after the first must be `rows`"));
  }
  v1::AttendRequest::Rows& rows = *incoming_.mutable_rows();
  const absl::Status finite = CheckFiniteQueries(rows.queries(), *spec, received_rows_);
  if (!finite.ok()) return Fail(finite);
  const int64_t count =
      static_cast<int64_t>(rows.queries().size()) / (int64_t{4} * spec->query_heads() * spec->head_dim());
  received_rows_ += count;
  {
    const MutexLock lock(mutex_);
    outstanding_rows_ += count;
  }
  runtime_->Continue(id, [&rows](ClusterState& state, RequestId request, int64_t now) {
    state.SubmitRows(request, std::move(*rows.mutable_queries()),
                     std::vector<int64_t>(rows.positions().begin(), rows.positions().end()), now);
  });
  const MutexLock lock(mutex_);
  reading_ = false;
  ReadMore();
}

void AttendStream::Begin(bool ok) {
  if (!ok || !incoming_.has_header()) {
    const MutexLock lock(mutex_);
    return EndWith(absl::InvalidArgumentError("the first message must be `header`"));
  }
  const v1::AttendRequest::Header header = incoming_.header();
  const RequestId id = runtime_->Start(this, [&header](ClusterState& state, RequestId request, int64_t now) {
    state.StartAttend(request, header, now);
  });
  bool cancelled = false;
  {
    const MutexLock lock(mutex_);
    id_ = id;
    cancelled = cancelled_;
    reading_ = false;
    ReadMore();
  }
  if (cancelled) runtime_->Cancel(id);
}

void AttendStream::OnStarted(const AttendStarted& started) {
  const MutexLock lock(mutex_);
  spec_ = started.spec;
  row_bytes_ = int64_t{4} * spec_->query_heads() * std::max(spec_->head_dim(), spec_->value_dim() + 2);
}

void AttendStream::OnRows(v1::AttendResponse::Rows&& rows) {
  v1::AttendResponse response;
  *response.mutable_rows() = std::move(rows);
  const MutexLock lock(mutex_);
  Enqueue(response);
}

void AttendStream::OnReply(absl::StatusOr<Answer> answer) {
  const MutexLock lock(mutex_);
  if (!answer.ok()) return EndWith(answer.status());
  const auto& totals = std::get<AttendTotals>(*answer);
  v1::AttendResponse response;
  v1::AttendSummary* summary = response.mutable_summary();
  summary->set_rows(totals.rows);
  summary->set_seconds(absl::ToDoubleSeconds(absl::Now() - start_));
  summary->set_workers(totals.workers);
  summary->set_collectives(totals.collectives);
  summary->set_row_heads_sink(totals.row_heads_sink);
  summary->set_row_heads_maximum(totals.row_heads_maximum);
  summary->set_bytes_read(totals.bytes_read);
  summary->set_length(totals.length);
  Enqueue(response);
  EndWith(absl::OkStatus());
}

void AttendStream::Fail(const absl::Status& status) {
  RequestId id = 0;
  {
    const MutexLock lock(mutex_);
    id = id_;
  }
  if (id != 0) runtime_->Cancel(id);
  const MutexLock lock(mutex_);
  EndWith(status);
}

void AttendStream::OnCancel() {
  RequestId id = 0;
  {
    const MutexLock lock(mutex_);
    cancelled_ = true;
    id = id_;
  }
  if (id != 0) runtime_->Cancel(id);
  const MutexLock lock(mutex_);
  EndWith(CallerGone());
}

void AttendStream::Enqueue(const v1::AttendResponse& response) {
  if (finished_ || ending_) return;
  queue_.push_back({Encode(response), response.rows().count()});
  if (queue_.size() == 1) StartWrite(&queue_.front().bytes);
}

void AttendStream::EndWith(const absl::Status& status) {
  if (finished_) return;
  if (ending_ && !end_.ok()) return;
  ending_ = true;
  end_ = status;
  // An error need not wait for the rows before it.
  if (!status.ok() && queue_.size() > 1) queue_.erase(queue_.begin() + 1, queue_.end());
  if (!queue_.empty()) return;
  finished_ = true;
  Finish(ToGrpc(end_));
}

void AttendStream::OnWriteDone(bool ok) {
  const MutexLock lock(mutex_);
  outstanding_rows_ -= queue_.front().rows;
  queue_.pop_front();
  if (!ok) queue_.clear();  // The call is cancelled; OnCancel ends it.
  if (!queue_.empty()) return StartWrite(&queue_.front().bytes);
  if (ending_ && !finished_) {
    finished_ = true;
    return Finish(ToGrpc(end_));
  }
  ReadMore();
}

void AttendStream::OnDone() {
  // Whoever called Finish may not have let go of the mutex yet.
  { const MutexLock lock(mutex_); }
  delete this;
}

void AttendStream::ReadMore() {
  if (reading_ || read_all_ || finished_ || ending_ || id_ == 0) return;
  if (outstanding_rows_ > 0 && outstanding_rows_ * row_bytes_ >= kCallBytesMax) return;
  reading_ = true;
  StartRead(&bytes_);
}

}  // namespace eduba
