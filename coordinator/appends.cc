#include "coordinator/appends.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "base/position_ranges.h"
#include "coordinator/settlement.h"
#include "rpc/limits.h"
#include "rpc/placement.h"

namespace eduba {
namespace {

constexpr size_t kReceiptsKept = 4096;
// So that a plan fits into one message: an extent is at most 20 bytes there.
constexpr int64_t kExtentsMax = 32768;

// The recorded appends that tile [at, at + count), as a range of indices; empty when they do not.
std::pair<size_t, size_t> TilingAppends(const std::vector<AppendRecord>& appends, int64_t at, int64_t count) {
  const auto first = std::lower_bound(appends.begin(), appends.end(), at,
                                      [](const AppendRecord& append, int64_t p) { return append.at < p; });
  const auto last = std::lower_bound(first, appends.end(), at + count,
                                     [](const AppendRecord& append, int64_t p) { return append.at < p; });
  if (first == appends.end() || first->at != at || last == first) return {0, 0};
  const AppendRecord& end = *std::prev(last);
  if (end.at + end.count != at + count) return {0, 0};
  return {first - appends.begin(), last - appends.begin()};
}

// What is wrong with an append that begins inside the session.
absl::Status CheckRepeat(const std::string& to, const SessionRecord& record, PositionRange range) {
  const int64_t length = record.length();
  if (range.end > length) {
    return absl::OutOfRangeError(absl::StrCat(to, ": ", RangeText(range), " starts inside the session's ",
                                              length, " positions and crosses their end: append at ",
                                              length));
  }
  if (const auto [first, last] = TilingAppends(record.appends, range.begin, range.size()); first == last) {
    return absl::AlreadyExistsError(
        absl::StrCat(to, ": positions ", RangeText(range),
                     " are stored already, by appends with other borders: repeat whole "
                     "appends, or append at ",
                     length));
  }
  return absl::OkStatus();
}

}  // namespace

Appends::Appends(Group* group, Sessions* sessions, Journal* journal, Outbox* outbox)
    : group_(group), sessions_(sessions), journal_(journal), outbox_(outbox) {}

absl::Status Appends::CheckPlan(const SessionEntry& session, const v1::PlanAppendRequest& args,
                                int64_t at) const {
  const int64_t length = session.record.length();
  const int64_t count = args.count();
  const std::string to = absl::StrCat("append to session '", session.record.name, "'");
  if (count < 1) {
    return absl::InvalidArgumentError(absl::StrCat(to, ": count is ", count, ", wanted at least 1"));
  }
  if (at < 0) return absl::InvalidArgumentError(absl::StrCat(to, ": at is ", at, ", wanted 0 or more"));
  if (const auto under_way = of_session_.find(session.record.id); under_way != of_session_.end()) {
    const v1::AppendPlan& other = appends_.at(under_way->second).plan;
    return absl::AbortedError(
        absl::StrCat(to, ": another one, of ", RangeText({other.at(), other.at() + other.count()}),
                     ", is under way: retry when it has been committed, aborted, or idle too long"));
  }
  if (at > length) {
    return absl::OutOfRangeError(absl::StrCat(to, ": it starts at ", at, ", but the session has ", length,
                                              " positions: a gap is not allowed, append at ", length));
  }
  if (count > kMaxPositions - at) {
    return absl::OutOfRangeError(absl::StrCat(to, ": ", count, " positions at ", at,
                                              " would pass the limit of ", kMaxPositions, " positions"));
  }
  const PositionRange range{at, at + count};
  if (at < length) {
    const absl::Status repeat = CheckRepeat(to, session.record, range);
    if (!repeat.ok()) return repeat;
  }
  if (OwnersOfRangeBound(session.record.placement, range) > kExtentsMax) {
    const int64_t most = (kExtentsMax - 1) * session.record.placement.stripe_pages * kPageRows;
    return absl::InvalidArgumentError(absl::StrCat(to, ": ", count, " positions are more than ", kExtentsMax,
                                                   " stripes: append at most ", most, " at once"));
  }
  return absl::OkStatus();
}

v1::AppendPlan Appends::MakePlan(const SessionEntry& session, int64_t at, int64_t count) const {
  v1::AppendPlan plan;
  plan.set_at(at);
  plan.set_count(count);
  plan.set_already_stored(at < session.record.length());
  const int64_t sinks = std::min(session.spec->sink_tokens(), at + count);
  if (sinks > at) plan.set_replicate_below(sinks);
  for (v1::Extent& extent : ExtentsOf(session.record.placement, {at, at + count})) {
    *plan.add_extents() = std::move(extent);
  }
  for (int rank = 0; rank < group_->size(); ++rank) plan.add_workers(group_->AddressOf(rank));
  return plan;
}

// 1. Reserve.
void Appends::Plan(RequestId request, const v1::PlanAppendRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = sessions_->FindTensor(args.session());
  if (!found.ok()) return outbox_->Respond(request, found.status());
  const SessionEntry& session = **found;
  const int64_t at = args.has_at() ? args.at() : session.record.length();
  const absl::Status status = CheckPlan(session, args, at);
  if (!status.ok()) return outbox_->Respond(request, status);

  // The epoch in the upper half: an id that a client kept over an epoch's end never means another append.
  const uint64_t id = group_->epoch() << 32 | next_++;
  of_session_[session.record.id] = id;
  Append& append = appends_[id];
  append.id = id;
  append.session_id = session.record.id;
  append.plan = MakePlan(session, at, args.count());
  append.plan.set_append_id(id);
  append.waiters = {request};

  v1::Command command;
  v1::BeginAppend* begin = command.mutable_begin_append();
  begin->set_append_id(id);
  begin->set_session_id(append.session_id);
  begin->set_at(at);
  begin->set_count(args.count());
  begin->set_compare_only(append.plan.already_stored());
  group_->Send(
      std::move(command), now_ms,
      [this, id](const Answered& answered, int64_t now) { OnBegun(id, answered, now); },
      [&append](int rank, v1::Command* own) {
        for (const v1::Extent& extent : append.plan.extents()) {
          if (extent.worker() == rank) *own->mutable_begin_append()->add_owned() = extent;
        }
      });
}

void Appends::OnBegun(uint64_t id, const Answered& answered, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) return;
  Append& append = it->second;
  const absl::Status status = group_->FirstFailure(answered);
  if (!status.ok()) return Undo(id, status, now_ms);
  append.phase = Phase::kOpen;
  append.expires_ms = now_ms + kAppendIdleTimeoutMs;
  for (const RequestId waiter : std::exchange(append.waiters, {}))
    outbox_->Respond(waiter, Answer(append.plan));
}

// 3. Is everything there?
void Appends::Commit(RequestId request, uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) {
    const auto receipt = std::find_if(receipts_.begin(), receipts_.end(),
                                      [id](const auto& entry) { return entry.first == id; });
    if (receipt != receipts_.end()) return outbox_->Respond(request, Answer(receipt->second));
    return outbox_->Respond(request, NoSuchAppend(id));
  }
  Append& append = it->second;
  if (append.phase == Phase::kBeginning) {
    return outbox_->Respond(request, absl::FailedPreconditionError("the append has not been planned yet"));
  }
  append.waiters.push_back(request);
  if (append.phase != Phase::kOpen) return;  // Asked again while it goes on.
  append.phase = Phase::kSealing;
  v1::Command command;
  command.mutable_seal_append()->set_append_id(id);
  group_->Send(std::move(command), now_ms,
               [this, id](const Answered& answered, int64_t now) { OnSealed(id, answered, now); });
}

void Appends::OnSealed(uint64_t id, const Answered& answered, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) return;
  Append& append = it->second;
  const absl::Status status = group_->FirstFailure(answered);
  if (absl::IsFailedPrecondition(status)) {
    // Rows are missing; they may still come.
    append.phase = Phase::kOpen;
    append.expires_ms = now_ms + kAppendIdleTimeoutMs;
    for (const RequestId waiter : std::exchange(append.waiters, {})) outbox_->Respond(waiter, status);
    return;
  }
  if (!status.ok()) return Undo(id, status, now_ms);

  const size_t exponent_bytes = ExponentBytes(*sessions_->ById(append.session_id)->spec);
  append.digest = {};
  append.exponents = answered.results[0].seal().exponents();
  for (size_t rank = 0; rank < answered.results.size(); ++rank) {
    const v1::SealResult& seal = answered.results[rank].seal();
    append.digest += Digest{seal.digest_low(), seal.digest_high()};
    if (append.plan.already_stored()) continue;
    if (seal.exponents().size() != exponent_bytes || !MergeExponents(seal.exponents(), &append.exponents)) {
      return group_->Expel(static_cast<int>(rank),
                           absl::StrCat("sealed an append with ", seal.exponents().size(),
                                        " bytes of exponents, wanted ", exponent_bytes),
                           now_ms);
    }
  }
  if (append.plan.already_stored()) return FinishComparison(&append, now_ms);
  // 4. It is written down before any worker publishes: what a query can see is never unknown to the store.
  append.phase = Phase::kRecording;
  const AppendRecord record{append.plan.at(), append.plan.count(), append.digest};
  journal_->Write(
      AppendCommitted{append.session_id, record},
      [this, id, session_id = append.session_id, record](const absl::Status& written, int64_t now) {
        OnRecorded(id, session_id, record, written, now);
      });
}

void Appends::FinishComparison(Append* append, int64_t now_ms) {
  const SessionRecord& session = sessions_->ById(append->session_id)->record;
  const PositionRange range{append->plan.at(), append->plan.at() + append->plan.count()};
  const auto [first, last] = TilingAppends(session.appends, range.begin, range.size());
  Digest stored;
  for (size_t i = first; i < last; ++i) stored += session.appends[i].digest;
  if (!(stored == append->digest)) {
    return Undo(append->id,
                absl::AlreadyExistsError(absl::StrCat("append to session '", session.name, "': positions ",
                                                      RangeText(range),
                                                      " are already stored with other content: append at ",
                                                      session.length(), ", or delete the session")),
                now_ms);
  }
  ReplyReceipt(append);
  Undo(append->id, absl::OkStatus(), now_ms);
}

void Appends::OnRecorded(uint64_t id, uint64_t session_id, const AppendRecord& record,
                         const absl::Status& status, int64_t now_ms) {
  SessionEntry* session = sessions_->ById(session_id);
  if (status.ok() && session != nullptr) session->record.appends.push_back(record);
  const auto it = appends_.find(id);
  // The epoch has ended meanwhile. In the next one workers publish what they sealed, if it is on record
  // (Reopening).
  if (it == appends_.end()) return;
  if (!status.ok()) return Undo(id, status, now_ms);
  it->second.phase = Phase::kPublishing;
  v1::Command command;
  command.mutable_commit_append()->set_append_id(id);
  command.mutable_commit_append()->set_exponents(std::move(it->second.exponents));
  group_->Send(std::move(command), now_ms,
               [this, id](const Answered& answered, int64_t now) { OnPublished(id, answered, now); });
}

// 5. The next query sees the rows.
void Appends::OnPublished(uint64_t id, const Answered& answered, int64_t now_ms) {
  for (size_t rank = 0; rank < answered.results.size(); ++rank) {
    const v1::CommandResult& result = answered.results[rank];
    if (result.code() == 0) continue;
    return group_->Expel(static_cast<int>(rank),
                         absl::StrCat("could not publish a sealed append: ", result.message()), now_ms);
  }
  ReplyReceipt(&appends_.at(id));
  Forget(id);
}

void Appends::ReplyReceipt(Append* append) {
  v1::AppendReceipt receipt;
  receipt.set_at(append->plan.at());
  receipt.set_count(append->plan.count());
  receipt.set_length(sessions_->ById(append->session_id)->record.length());
  receipt.set_already_stored(append->plan.already_stored());
  receipt.set_digest_low(append->digest.low);
  receipt.set_digest_high(append->digest.high);
  for (const RequestId waiter : std::exchange(append->waiters, {})) outbox_->Respond(waiter, Answer(receipt));
  receipts_.emplace_back(append->id, std::move(receipt));
  if (receipts_.size() > kReceiptsKept) receipts_.pop_front();
}

void Appends::Abort(RequestId request, uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) return outbox_->Respond(request, NoSuchAppend(id));
  const Phase phase = it->second.phase;
  if (phase == Phase::kRecording || phase == Phase::kPublishing) {
    return outbox_->Respond(
        request, absl::FailedPreconditionError("the append is being committed: it cannot be aborted"));
  }
  Undo(id, absl::AbortedError("the append was aborted by another call"), now_ms);
  outbox_->Respond(request, Answer(Done{}));
}

absl::Status Appends::Drop(const SessionEntry& session, int64_t now_ms) {
  const auto it = of_session_.find(session.record.id);
  if (it == of_session_.end()) return absl::OkStatus();
  const uint64_t id = it->second;
  const Phase phase = appends_.at(id).phase;
  const std::string& name = session.record.name;
  if (phase == Phase::kRecording || phase == Phase::kPublishing) {
    return absl::AbortedError(
        absl::StrCat("an append to session '", name, "' is being committed: retry in a moment"));
  }
  Undo(id, absl::NotFoundError(absl::StrCat("session '", name, "' was deleted")), now_ms);
  return absl::OkStatus();
}

void Appends::Undo(uint64_t id, const absl::Status& status, int64_t now_ms) {
  for (const RequestId waiter : std::exchange(appends_.at(id).waiters, {})) outbox_->Respond(waiter, status);
  Forget(id);
  v1::Command command;
  command.mutable_abort_append()->set_append_id(id);
  group_->Send(std::move(command), now_ms);
}

void Appends::Forget(uint64_t id) {
  of_session_.erase(appends_.at(id).session_id);
  appends_.erase(id);
}

absl::Status Appends::NoSuchAppend(uint64_t id) const {
  const uint64_t epoch = id >> 32;
  const uint64_t number = id & UINT32_MAX;
  const bool old = epoch > 0 && epoch < group_->epoch() && number > 0;
  if (old || (epoch == group_->epoch() && number > 0 && number < next_ && !group_->active())) {
    return absl::UnavailableError(
        absl::StrCat("the append was part of epoch ", epoch, ", which is over: plan it again"));
  }
  return absl::NotFoundError(absl::StrCat(
      "there is no append ", id, ": it was never planned, aborted, or idle for too long; plan it again"));
}

void Appends::Keep(uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it != appends_.end()) it->second.expires_ms = now_ms + kAppendIdleTimeoutMs;
}

void Appends::Tick(int64_t now_ms) {
  std::vector<uint64_t> idle;
  for (const auto& [id, append] : appends_) {
    if (append.phase == Phase::kOpen && now_ms > append.expires_ms) idle.push_back(id);
  }
  for (const uint64_t id : idle) {
    outbox_->Log(absl::StrCat("append ", id, " was idle for too long and is undone"));
    Undo(id, absl::AbortedError("the append was idle for too long"), now_ms);
  }
}

void Appends::Cancel(RequestId request, int64_t now_ms) {
  for (auto& [id, append] : appends_) {
    if (std::erase(append.waiters, request) == 0) continue;
    if (append.phase == Phase::kBeginning) Undo(id, absl::CancelledError(), now_ms);
    return;
  }
}

void Appends::OnOver(const absl::Status& status) {
  for (const auto& [id, append] : std::exchange(appends_, {})) {
    for (const RequestId waiter : append.waiters) outbox_->Respond(waiter, status);
  }
  of_session_.clear();
}

}  // namespace eduba
