#include "coordinator/reopening.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

constexpr int64_t kPlaceDelayMs = 2000;  // After the disk took no placement.
// For a token that is read again, by a large model on slow cores.
constexpr int64_t kReadAgainMsPerToken = 100;

}  // namespace

void Reopening::OnActive(int64_t now_ms) {
  v1::Command command;
  const std::vector<SessionEntry*> all = sessions_->All();
  // Earlier epochs have left only sessions that are ready or being struck out: whatever else was under way
  // has ended with its epoch, or with the writing down of this one (Journal).
  for (SessionEntry* session : all) {
    command.mutable_retain_sessions()->add_session_ids(session->record.id);
    session->open_epoch = group_->epoch();
    session->lost.clear();
    session->lost_stripes.clear();
  }
  command.mutable_retain_sessions();
  group_->Send(std::move(command), now_ms);
  waiting_ = static_cast<int64_t>(all.size()) + 1;
  for (SessionEntry* session : all) Begin(session, now_ms);
  Ended();  // Called for the loop itself, so that a coordinator without sessions serves at once.
}

void Reopening::OnOver() {
  if (std::exchange(serving_, false)) outbox_->Emit(SetServing{false});
  unplaced_.clear();
}

void Reopening::Tick(int64_t now_ms) {
  if (unplaced_.empty() || now_ms < place_at_ms_) return;
  for (const uint64_t id : std::exchange(unplaced_, {})) {
    SessionEntry* session = sessions_->ById(id);
    if (session == nullptr) continue;
    ++waiting_;
    PlaceAnew(*session);
  }
}

void Reopening::Begin(SessionEntry* session, int64_t now_ms) {
  const Placement& placement = session->record.placement;
  if (placement.nodes == group_->nodes()) return Open(session, now_ms);
  if (session->record.length() == 0) return PlaceAnew(*session);
  std::vector<std::string> absent;
  for (const std::string& node : placement.nodes) {
    if (std::find(group_->nodes().begin(), group_->nodes().end(), node) == group_->nodes().end())
      absent.push_back(node);
  }
  Lose(session, SettleWithout(session->record, absent));
}

void Reopening::PlaceAnew(const SessionEntry& session) {
  const int64_t version = session.record.placement.nodes.empty() ? 1 : session.record.placement.version + 1;
  SessionPlaced change{session.record.id, sessions_->Place(session.record.id, session.record.spec, version)};
  // The record comes first: workers must not hold content where the record does not look for it.
  journal_->Write(change, [this, change, epoch = group_->epoch()](const absl::Status& status, int64_t now) {
    SessionEntry* session = sessions_->ById(change.session_id);
    if (status.ok() && session != nullptr) session->record.placement = change.placement;
    if (!group_->active() || group_->epoch() != epoch) return;
    if (status.ok() && session != nullptr && session->phase != SessionEntry::Phase::kClosing)
      return Open(session, now);
    if (!status.ok()) {
      unplaced_.push_back(change.session_id);
      place_at_ms_ = now + kPlaceDelayMs;
    }
    Ended();
  });
}

void Reopening::Open(SessionEntry* session, int64_t now_ms) {
  group_->Send(OpenCommand(session->record), now_ms,
               [this, id = session->record.id](const Answered& answered, int64_t now) {
                 OnOpened(id, answered, now);
               });
}

void Reopening::OnOpened(uint64_t id, const Answered& answered, int64_t now_ms) {
  SessionEntry* session = sessions_->ById(id);
  if (session == nullptr || session->phase == SessionEntry::Phase::kClosing) return Ended();
  const absl::Status status = group_->FirstFailure(answered);
  if (!status.ok()) {
    Settlement failed;
    failed.why_lost = absl::StrCat("it could not be opened again: ", std::string(status.message()));
    return Lose(session, failed);
  }
  std::vector<v1::SessionContent> contents;
  for (const v1::CommandResult& result : answered.results) contents.push_back(result.content());
  const Settlement settlement = Settle(session->record, contents);
  if (!settlement.why_lost.empty()) return Lose(session, settlement);
  if (settlement.length > session->record.length()) return Adopt(session, settlement, now_ms);
  SettleOnWorkers(session, settlement, now_ms);
}

void Reopening::Adopt(SessionEntry* session, const Settlement& settlement, int64_t now_ms) {
  const AppendCommitted change{session->record.id,
                               {session->recorded, settlement.length - session->recorded, {}}};
  session->record.appends = {{0, settlement.length, {}}};
  // A session that is being struck out has no record to add to.
  if (session->phase == SessionEntry::Phase::kErasing) return SettleOnWorkers(session, settlement, now_ms);
  journal_->Write(change, [this, id = change.session_id, settlement, epoch = group_->epoch()](
                              const absl::Status& status, int64_t now) {
    SessionEntry* session = sessions_->ById(id);
    // Otherwise it is written with the next tokens.
    if (status.ok() && session != nullptr) session->recorded = settlement.length;
    if (!group_->active() || group_->epoch() != epoch) return;
    if (session == nullptr || session->phase == SessionEntry::Phase::kClosing) return Ended();
    SettleOnWorkers(session, settlement, now);
  });
}

void Reopening::SettleOnWorkers(SessionEntry* session, const Settlement& settlement, int64_t now_ms) {
  v1::Command command;
  v1::SettleSession* settle = command.mutable_settle_session();
  settle->set_session_id(session->record.id);
  settle->set_length(settlement.length);
  settle->set_exponents(settlement.exponents);
  settle->set_read_again(settlement.read_again);
  // Reading again may take long: others do not wait for it.
  if (settlement.read_again) Ended();
  const int64_t extra_ms = settlement.read_again ? settlement.length * kReadAgainMsPerToken : 0;
  group_->Send(
      std::move(command), now_ms,
      [this, id = session->record.id, waited = !settlement.read_again](const Answered& answered, int64_t) {
        SessionEntry* settled = sessions_->ById(id);
        const absl::Status status = group_->FirstFailure(answered);
        if (settled != nullptr && status.ok()) settled->here = true;
        if (settled != nullptr && !status.ok()) {
          settled->lost = absl::StrCat("it could not be settled: ", std::string(status.message()));
        }
        if (waited) Ended();
      },
      nullptr, extra_ms);
}

void Reopening::Lose(SessionEntry* session, const Settlement& settlement) {
  session->lost = settlement.why_lost;
  session->lost_stripes = settlement.lost;
  outbox_->Log(absl::StrCat("session '", session->record.name, "' is lost in epoch ", group_->epoch(), ": ",
                            settlement.why_lost));
  Ended();
}

void Reopening::Ended() {
  if (--waiting_ > 0 || serving_) return;
  serving_ = true;
  outbox_->Emit(SetServing{true});
}

}  // namespace eduba
