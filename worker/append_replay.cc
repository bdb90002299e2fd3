#include "worker/append_replay.h"

#include <utility>

#include "base/status_macros.h"

namespace eduba {
namespace {

// Rows that are taken together have about as many bytes: enough to share out, and few beside the session.
constexpr int64_t kWaitingBytes = int64_t{16} << 20;

}  // namespace

absl::Status AppendReplay::Begin(const AppendShare& share) {
  EDUBA_ASSIGN_OR_RETURN(append_, StagedAppend::Begin(backend_, store_, sequence_, share));
  return absl::OkStatus();
}

absl::Status AppendReplay::AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                                   absl::Span<const char> values) {
  EDUBA_RETURN_IF_ERROR(CheckBegun());
  if (waiting_count_ == std::ssize(waiting_)) waiting_.emplace_back();
  Rows& rows = waiting_[waiting_count_++];
  rows.layer = layer;
  rows.first = first;
  rows.count = count;
  rows.keys.assign(keys.begin(), keys.end());
  rows.values.assign(values.begin(), values.end());
  waiting_bytes_ += std::ssize(keys) + std::ssize(values);
  return waiting_bytes_ < kWaitingBytes ? absl::OkStatus() : TakeRows();
}

absl::Status AppendReplay::TakeRows() {
  const int64_t count = std::exchange(waiting_count_, 0);
  waiting_bytes_ = 0;
  std::vector<absl::Status> statuses(count);
  const DType dtype = sequence_->spec().shape.key_dtype;
  threads_->ParallelFor(count, [&](int64_t i, int /*thread*/) {
    const Rows& rows = waiting_[i];
    statuses[i] = append_->AddRows(rows.layer, rows.first, rows.count, dtype, rows.keys, rows.values);
  });
  for (const absl::Status& status : statuses) EDUBA_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

absl::Status AppendReplay::Seal(const AppendSeal& seal) {
  EDUBA_RETURN_IF_ERROR(CheckBegun());
  EDUBA_RETURN_IF_ERROR(TakeRows());
  EDUBA_ASSIGN_OR_RETURN(const AppendSeal found, append_->Seal());
  if (found.digest == seal.digest && found.exponents == seal.exponents) return absl::OkStatus();
  return absl::DataLossError("the rows are not those that were sealed");
}

absl::Status AppendReplay::Publish(absl::Span<const int16_t> exponents) {
  EDUBA_RETURN_IF_ERROR(CheckBegun());
  EDUBA_RETURN_IF_ERROR(append_->Publish({exponents.begin(), exponents.end()}));
  append_ = nullptr;
  return absl::OkStatus();
}

std::shared_ptr<StagedAppend> AppendReplay::TakeSealed() {
  return append_ != nullptr && append_->sealed() ? std::move(append_) : nullptr;
}

absl::Status AppendReplay::CheckBegun() const {
  return append_ != nullptr ? absl::OkStatus() : absl::DataLossError("rows belong to no append");
}

}  // namespace eduba
