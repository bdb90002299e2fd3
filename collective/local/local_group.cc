#include "collective/local/local_group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "base/check.h"
#include "collective/reduce.h"

namespace eduba {
namespace {

// The elements that a rank reduces at a time: few enough that the sum stays in the first-level cache, and so
// many that taking a slice (one lock) costs nothing in comparison.
constexpr int64_t kSliceElements = 2048;

}  // namespace

LocalGroup::LocalGroup(int size) : size_(size), ranks_(size), calls_(size) {}

bool LocalGroup::Claim(int rank) {
  MutexLock lock(mutex_);
  return !std::exchange(ranks_[rank].claimed, true);
}

absl::Status LocalGroup::Run(int rank, const LocalCall& call, absl::Time deadline) {
  MutexLock lock(mutex_);
  Rank& self = ranks_[rank];
  EDUBA_CHECK(!self.entered);  // One call at a time.
  if (!failure_.ok()) return ErrorFor(rank, deadline);
  self.entered = true;
  calls_[rank] = call;
  const uint64_t round = round_;
  if (++entered_ == size_) {
    absl::Status differences = Differences();
    if (!differences.ok()) {
      Fail(differences);
      self.entered = false;
      return differences;
    }
    OpenWork();
  }
  while (round_ == round) {
    if (open_) {
      if (next_slice_ < slices_) {
        TakeSlices();
      } else {
        changed_.Wait(mutex_);
      }
      continue;
    }
    // The round is not open yet, and something may have gone wrong.
    absl::Status error;
    if (!failure_.ok()) {
      error = ErrorFor(rank, deadline);
    } else if (absl::Now() >= deadline) {
      error = absl::DeadlineExceededError(
          absl::StrCat(DescribeCall(call.operation, call.count), ": ", Missing(), " did not come in time"));
      Fail(error);
    }
    if (!error.ok()) {
      self.entered = false;
      return error;
    }
    changed_.WaitUntil(mutex_, absl::ToChronoTime(deadline));
  }
  return absl::OkStatus();
}

void LocalGroup::Leave(int rank, const std::string& reason, const std::string& others) {
  MutexLock lock(mutex_);
  if (ranks_[rank].aborted.ok()) ranks_[rank].aborted = absl::AbortedError(reason);
  Fail(absl::UnavailableError(others));
}

void LocalGroup::OpenWork() {
  // An empty payload is one slice of nothing, so that every round ends the same way.
  const LocalCall& call = calls_[0];
  slices_ = call.operation == Operation::kSendReceive
                ? size_
                : std::max<int64_t>(1, (call.count + kSliceElements - 1) / kSliceElements);
  next_slice_ = finished_slices_ = 0;
  open_ = true;
  if (slices_ > 1) changed_.NotifyAll();
}

void LocalGroup::TakeSlices() {
  while (next_slice_ < slices_) {
    const int64_t slice = next_slice_++;
    mutex_.Unlock();
    ReduceSlice(slice);
    mutex_.Lock();
    if (++finished_slices_ < slices_) continue;
    open_ = false;
    entered_ = 0;
    for (Rank& rank : ranks_) rank.entered = false;
    ++round_;
    changed_.NotifyAll();
    return;  // A new round may be open by now; its slices are not this call's.
  }
}

void LocalGroup::ReduceSlice(int64_t slice) const {
  const LocalCall& first = calls_[0];
  if (first.operation == Operation::kSendReceive) return DeliverTo(slice);
  const int64_t begin = slice * kSliceElements;
  const int64_t count = std::min(kSliceElements, first.count - begin);
  if (first.operation == Operation::kReduceScatterI64) return ScatterSlice(begin, begin + count);
  const auto reduce = [&]<typename T>(T /*element*/, auto combine) {
    T* const result = static_cast<T*>(first.data) + begin;
    for (int r = 1; r < size_; ++r) {
      combine(absl::MakeSpan(result, count),
              absl::MakeConstSpan(static_cast<const T*>(calls_[r].data) + begin, count));
    }
    for (int r = 1; r < size_; ++r) std::copy_n(result, count, static_cast<T*>(calls_[r].data) + begin);
  };
  if (first.operation == Operation::kSumI64) reduce(int64_t{}, AddInto);
  if (first.operation == Operation::kMaxF32) reduce(float{}, MaxInto);
}

void LocalGroup::ScatterSlice(int64_t begin, int64_t end) const {
  const absl::Span<const int64_t> begins = calls_[0].part_begins;
  for (int owner = 0; owner < size_; ++owner) {
    const int64_t from = std::max(begin, begins[owner]);
    const int64_t count = std::min(end, begins[owner + 1]) - from;
    if (count <= 0) continue;
    const auto words = [&](int rank) {
      return absl::MakeSpan(static_cast<int64_t*>(calls_[rank].data) + from, count);
    };
    for (int r = 0; r < size_; ++r) {
      if (r != owner) AddInto(words(owner), words(r));
    }
  }
}

void LocalGroup::DeliverTo(int64_t rank) const {
  const LocalCall& call = calls_[rank];
  if (call.transfer.receive_bytes == 0) return;
  std::memcpy(call.data, calls_[call.transfer.from].send, call.transfer.receive_bytes);
}

absl::Status LocalGroup::Differences() const {
  const LocalCall& first = calls_[0];
  for (int r = 1; r < size_; ++r) {
    const LocalCall& other = calls_[r];
    if (other.operation == first.operation && other.count == first.count &&
        other.part_begins == first.part_begins) {
      continue;
    }
    return absl::InternalError(absl::StrCat(
        "the ranks made different calls: rank 0 ", DescribeCall(first.operation, first.count), ", rank ", r,
        " ", DescribeCall(other.operation, other.count),
        other.part_begins == first.part_begins ? "" : " in other parts", " (call ", round_, ")"));
  }
  if (first.operation != Operation::kSendReceive) return absl::OkStatus();
  std::vector<Transfer> transfers;
  for (const LocalCall& call : calls_) transfers.push_back(call.transfer);
  return CheckTransfers(transfers);
}

std::string LocalGroup::Missing() const {
  std::vector<int> missing;
  for (int r = 0; r < size_; ++r) {
    if (!ranks_[r].entered) missing.push_back(r);
  }
  return absl::StrCat("rank ", absl::StrJoin(missing, ", "), " of ", size_);
}

absl::Status LocalGroup::ErrorFor(int rank, absl::Time deadline) const {
  if (!ranks_[rank].aborted.ok()) return ranks_[rank].aborted;
  if (absl::IsInternal(failure_)) return failure_;
  const std::string text(failure_.message());
  return absl::Now() >= deadline ? absl::DeadlineExceededError(text) : absl::UnavailableError(text);
}

void LocalGroup::Fail(const absl::Status& status) {
  if (failure_.ok()) failure_ = status;
  changed_.NotifyAll();
}

}  // namespace eduba
