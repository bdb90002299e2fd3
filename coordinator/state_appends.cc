// ClusterState: appends. The numbers are those of docs/flows.md.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "coordinator/placement.h"
#include "coordinator/state.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

static_assert(std::endian::native == std::endian::little, "exponents travel as little-endian int16");

constexpr size_t kReceiptsKept = 4096;
// So that a plan fits into one message: an extent is at most 20 bytes there.
constexpr int64_t kExtentsMax = 32768;

std::string Range(int64_t at, int64_t count) { return absl::StrCat("[", at, ", ", at + count, ")"); }

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

// Element by element; false when the sizes differ.
bool MergeExponents(const std::string& from, std::string* into) {
  if (from.size() != into->size()) return false;
  for (size_t i = 0; i + 1 < from.size(); i += 2) {
    int16_t a = 0;
    int16_t b = 0;
    std::memcpy(&a, from.data() + i, 2);
    std::memcpy(&b, into->data() + i, 2);
    if (a > b) std::memcpy(into->data() + i, &a, 2);
  }
  return true;
}

}  // namespace

absl::StatusOr<v1::AppendPlan> ClusterState::MakePlan(const SessionEntry& session,
                                                      const v1::PlanAppendRequest& args) const {
  const int64_t length = session.record.length();
  const int64_t at = args.has_at() ? args.at() : length;
  const std::string to = absl::StrCat("append to session '", session.record.name, "'");
  if (args.count() < 1) {
    return absl::InvalidArgumentError(absl::StrCat(to, ": count is ", args.count(), ", wanted at least 1"));
  }
  if (at < 0) return absl::InvalidArgumentError(absl::StrCat(to, ": at is ", at, ", wanted 0 or more"));
  if (session.append_id != 0) {
    const v1::AppendPlan& other = appends_.at(session.append_id).plan;
    return absl::AbortedError(
        absl::StrCat(to, ": another one, of ", Range(other.at(), other.count()),
                     ", is under way: retry when it has been committed, aborted, or idle too "
                     "long"));
  }
  if (at > length) {
    return absl::OutOfRangeError(absl::StrCat(to, ": it starts at ", at, ", but the session has ", length,
                                              " positions: a gap is not allowed, append at ", length));
  }
  if (args.count() > kMaxPositions - at) {
    return absl::OutOfRangeError(absl::StrCat(to, ": ", args.count(), " positions at ", at,
                                              " would pass the limit of ", kMaxPositions, " positions"));
  }
  const int64_t count = args.count();
  if (at < length) {
    if (at + count > length) {
      return absl::OutOfRangeError(absl::StrCat(to, ": ", Range(at, count), " starts inside the session's ",
                                                length, " positions and crosses their end: append at ",
                                                length));
    }
    if (const auto [first, last] = TilingAppends(session.record.appends, at, count); first == last) {
      return absl::AlreadyExistsError(
          absl::StrCat(to, ": positions ", Range(at, count),
                       " are stored already, by appends with other borders: repeat whole "
                       "appends, or append at ",
                       length));
    }
  }
  const int64_t stripe_pages = session.spec->stripe_pages();
  const PositionRange range{at, at + count};
  if (ExtentBound(range, stripe_pages, options_.group_size) > kExtentsMax) {
    return absl::InvalidArgumentError(absl::StrCat(to, ": ", count, " positions are more than ", kExtentsMax,
                                                   " stripes: append at most ",
                                                   (kExtentsMax - 1) * stripe_pages * kPageRows, " at once"));
  }
  v1::AppendPlan plan;
  plan.set_at(at);
  plan.set_count(count);
  plan.set_already_stored(at < length);
  const int64_t sinks = std::min(session.spec->sink_tokens(), at + count);
  if (sinks > at) plan.set_replicate_below(sinks);
  for (v1::Extent& extent : PlaceRange(range, stripe_pages, options_.group_size)) {
    *plan.add_extents() = std::move(extent);
  }
  return plan;
}

// 1. Reserve.
void ClusterState::PlanAppend(RequestId request, const v1::PlanAppendRequest& args, int64_t now_ms) {
  const absl::StatusOr<SessionEntry*> found = FindTensorSession(args.session());
  if (!found.ok()) return Respond(request, found.status());
  SessionEntry* session = *found;
  absl::StatusOr<v1::AppendPlan> plan = MakePlan(*session, args);
  if (!plan.ok()) return Respond(request, plan.status());

  // The epoch in the upper half: an id that a client kept over an epoch's end never means another append.
  const uint64_t id = epoch_ << 32 | next_append_++;
  plan->set_append_id(id);
  for (const WorkerEntry* worker : Ranks()) plan->add_workers(worker->hello.address());
  session->append_id = id;
  AppendEntry& append = appends_[id];
  append.id = id;
  append.session_id = session->record.id;
  append.plan = *std::move(plan);
  append.waiters = {request};

  v1::Command command;
  v1::BeginAppend* begin = command.mutable_begin_append();
  begin->set_append_id(id);
  begin->set_session_id(append.session_id);
  begin->set_at(append.plan.at());
  begin->set_count(append.plan.count());
  begin->set_compare_only(append.plan.already_stored());
  Command({CommandKind::kBeginAppend, id, 0, {}, 0, {}}, std::move(command), now_ms,
          [&append](int rank, v1::Command* own) {
            for (const v1::Extent& extent : append.plan.extents()) {
              if (extent.worker() == rank) *own->mutable_begin_append()->add_owned() = extent;
            }
          });
}

void ClusterState::OnBegun(const PendingCommand& command, int64_t now_ms) {
  const auto it = appends_.find(command.subject);
  if (it == appends_.end()) return;
  AppendEntry& append = it->second;
  const absl::Status status = FirstFailure(command);
  if (!status.ok()) return Undo(append.id, status, now_ms);
  append.phase = AppendPhase::kOpen;
  append.expires_ms = now_ms + kAppendIdleTimeoutMs;
  for (const RequestId waiter : std::exchange(append.waiters, {})) Respond(waiter, Answer(append.plan));
}

// 3. Is everything there?
void ClusterState::CommitAppend(RequestId request, uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) {
    const auto receipt = std::find_if(receipts_.begin(), receipts_.end(),
                                      [id](const auto& entry) { return entry.first == id; });
    if (receipt != receipts_.end()) return Respond(request, Answer(receipt->second));
    return Respond(request, NoSuchAppend(id));
  }
  AppendEntry& append = it->second;
  if (append.phase == AppendPhase::kBeginning) {
    return Respond(request, absl::FailedPreconditionError("the append has not been planned yet"));
  }
  append.waiters.push_back(request);
  if (append.phase != AppendPhase::kOpen) return;  // Asked again while it goes on.
  append.phase = AppendPhase::kSealing;
  v1::Command command;
  command.mutable_seal_append()->set_append_id(id);
  Command({CommandKind::kSealAppend, id, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::OnSealed(const PendingCommand& command, int64_t now_ms) {
  const auto it = appends_.find(command.subject);
  if (it == appends_.end()) return;
  AppendEntry& append = it->second;
  const absl::Status status = FirstFailure(command);
  if (absl::IsFailedPrecondition(status)) {
    // Rows are missing; they may still come.
    append.phase = AppendPhase::kOpen;
    append.expires_ms = now_ms + kAppendIdleTimeoutMs;
    for (const RequestId waiter : std::exchange(append.waiters, {})) Respond(waiter, status);
    return;
  }
  if (!status.ok()) return Undo(append.id, status, now_ms);

  const SessionEntry* session = SessionById(append.session_id);
  const size_t exponent_bytes =
      size_t{2} * session->spec->layers() * session->spec->kv_heads() * session->spec->value_dim();
  append.digest = {};
  for (WorkerEntry* worker : Ranks()) {
    const v1::SealResult& seal = command.results[worker->rank]->seal();
    append.digest += Digest{seal.digest_low(), seal.digest_high()};
    if (append.plan.already_stored()) continue;
    if (worker->rank == 0) append.exponents = seal.exponents();
    if (append.exponents.size() != exponent_bytes || !MergeExponents(seal.exponents(), &append.exponents)) {
      return Expel(worker->id,
                   absl::StrCat("sealed an append with ", seal.exponents().size(),
                                " bytes of exponents, wanted ", exponent_bytes),
                   now_ms);
    }
  }
  if (append.plan.already_stored()) return FinishComparison(&append, now_ms);
  // 4. Written down before any worker publishes: what a query can see is never unknown to the store.
  append.phase = AppendPhase::kRecording;
  Write(AppendCommitted{append.session_id, {append.plan.at(), append.plan.count(), append.digest}},
        append.id);
}

void ClusterState::FinishComparison(AppendEntry* append, int64_t now_ms) {
  SessionEntry* session = SessionById(append->session_id);
  const int64_t at = append->plan.at();
  const int64_t count = append->plan.count();
  const auto [first, last] = TilingAppends(session->record.appends, at, count);
  Digest stored;
  for (size_t i = first; i < last; ++i) stored += session->record.appends[i].digest;
  if (!(stored == append->digest)) {
    return Undo(append->id,
                absl::AlreadyExistsError(absl::StrCat("append to session '", session->record.name,
                                                      "': positions ", Range(at, count),
                                                      " are already stored with other content: append at ",
                                                      session->record.length(), ", or delete the session")),
                now_ms);
  }
  ReplyReceipt(append, session);
  Undo(append->id, absl::OkStatus(), now_ms);
}

void ClusterState::OnAppendRecorded(const AppendCommitted& change, uint64_t append_id,
                                    const absl::Status& status, int64_t now_ms) {
  if (append_id == 0) return OnTokensRecorded(change.session_id, status, now_ms);
  SessionEntry* session = SessionById(change.session_id);
  const auto it = appends_.find(append_id);
  if (!status.ok()) {
    if (it != appends_.end()) Undo(append_id, status, now_ms);
    return;
  }
  if (session == nullptr) return;
  session->record.appends.push_back(change.append);
  if (it == appends_.end()) {
    // The epoch ended in between: it is on record, and its content is gone.
    if (session->lost.empty()) session->lost = "its epoch ended while an append was being committed";
    return;
  }
  AppendEntry& append = it->second;
  append.phase = AppendPhase::kPublishing;
  v1::Command command;
  command.mutable_commit_append()->set_append_id(append_id);
  command.mutable_commit_append()->set_exponents(std::move(append.exponents));
  Command({CommandKind::kCommitAppend, append_id, 0, {}, 0, {}}, std::move(command), now_ms);
}

// 5. The next query sees the rows.
void ClusterState::OnPublished(const PendingCommand& command, int64_t now_ms) {
  for (WorkerEntry* worker : Ranks()) {
    const v1::CommandResult& result = *command.results[worker->rank];
    if (result.code() == 0) continue;
    return Expel(worker->id, absl::StrCat("could not publish a sealed append: ", result.message()), now_ms);
  }
  AppendEntry& append = appends_.at(command.subject);
  ReplyReceipt(&append, SessionById(append.session_id));
  ForgetAppend(append.id);
}

void ClusterState::ReplyReceipt(AppendEntry* append, SessionEntry* session) {
  v1::AppendReceipt receipt;
  receipt.set_at(append->plan.at());
  receipt.set_count(append->plan.count());
  receipt.set_length(session->record.length());
  receipt.set_already_stored(append->plan.already_stored());
  receipt.set_digest_low(append->digest.low);
  receipt.set_digest_high(append->digest.high);
  for (const RequestId waiter : std::exchange(append->waiters, {})) Respond(waiter, Answer(receipt));
  receipts_.emplace_back(append->id, std::move(receipt));
  if (receipts_.size() > kReceiptsKept) receipts_.pop_front();
}

void ClusterState::AbortAppend(RequestId request, uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it == appends_.end()) return Respond(request, NoSuchAppend(id));
  const AppendPhase phase = it->second.phase;
  if (phase == AppendPhase::kRecording || phase == AppendPhase::kPublishing) {
    return Respond(request,
                   absl::FailedPreconditionError("the append is being committed: it cannot be aborted"));
  }
  Undo(id, absl::AbortedError("the append was aborted by another call"), now_ms);
  Respond(request, Answer(Done{}));
}

void ClusterState::Undo(uint64_t id, const absl::Status& status, int64_t now_ms) {
  for (const RequestId waiter : std::exchange(appends_.at(id).waiters, {})) Respond(waiter, status);
  ForgetAppend(id);
  v1::Command command;
  command.mutable_abort_append()->set_append_id(id);
  Command({CommandKind::kAbortAppend, id, 0, {}, 0, {}}, std::move(command), now_ms);
}

void ClusterState::ForgetAppend(uint64_t id) {
  const auto it = appends_.find(id);
  SessionEntry* session = SessionById(it->second.session_id);
  if (session != nullptr) session->append_id = 0;
  appends_.erase(it);
}

absl::Status ClusterState::NoSuchAppend(uint64_t id) const {
  const uint64_t epoch = id >> 32;
  const uint64_t number = id & UINT32_MAX;
  const bool old = epoch > 0 && epoch < epoch_ && number > 0;
  if (old || (epoch == epoch_ && number > 0 && number < next_append_ && phase_ != Phase::kActive)) {
    return absl::UnavailableError(absl::StrCat("the append was part of epoch ", epoch,
                                               ", which is over; nothing of it was kept: plan it again"));
  }
  return absl::NotFoundError(absl::StrCat(
      "there is no append ", id, ": it was never planned, aborted, or idle for too long; plan it again"));
}

// Some of it has come in.
void ClusterState::KeepAppend(uint64_t id, int64_t now_ms) {
  const auto it = appends_.find(id);
  if (it != appends_.end()) it->second.expires_ms = now_ms + kAppendIdleTimeoutMs;
}

void ClusterState::ExpireAppends(int64_t now_ms) {
  std::vector<uint64_t> idle;
  for (const auto& [id, append] : appends_) {
    if (append.phase == AppendPhase::kOpen && now_ms > append.expires_ms) idle.push_back(id);
  }
  for (const uint64_t id : idle) {
    Emit(Note{absl::StrCat("append ", id, " was idle for too long and is undone")});
    Undo(id, absl::AbortedError("the append was idle for too long"), now_ms);
  }
}

}  // namespace eduba
