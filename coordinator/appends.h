#ifndef EDUBA_COORDINATOR_APPENDS_H_
#define EDUBA_COORDINATOR_APPENDS_H_

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/group.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "coordinator/sessions.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Appends of keys and values to tensor sessions, one at a time for each session: planned, uploaded (which the
// coordinator does not see), sealed, written down, published. The steps are those of README.md.
class Appends {
 public:
  Appends(Group* group, Sessions* sessions, Journal* journal, Outbox* outbox);

  // ---- Calls
  void Plan(RequestId request, const v1::PlanAppendRequest& args, int64_t now_ms);
  void Commit(RequestId request, uint64_t append_id, int64_t now_ms);
  void Abort(RequestId request, uint64_t append_id, int64_t now_ms);
  void Cancel(RequestId request, int64_t now_ms);

  // Some of the append has come in: it is not idle.
  void Keep(uint64_t append_id, int64_t now_ms);
  // Undoes those that are idle for too long.
  void Tick(int64_t now_ms);
  void OnActive() { next_ = 1; }
  void OnOver(const absl::Status& status);
  // The session's append is undone, because the session is deleted. ABORTED: it is being committed.
  absl::Status Drop(const SessionEntry& session, int64_t now_ms);

 private:
  enum class Phase { kBeginning, kOpen, kSealing, kRecording, kPublishing };
  struct Append {
    uint64_t id = 0;
    uint64_t session_id = 0;
    v1::AppendPlan plan;
    Phase phase = Phase::kBeginning;
    int64_t expires_ms = 0;          // Later with every piece that comes in.
    std::vector<RequestId> waiters;  // Those who wait for the plan, later for the commit.
    Digest digest;                   // After the seal: over all workers.
    std::string exponents;           // After the seal: the maximum over all workers.
  };

  absl::Status CheckPlan(const SessionEntry& session, const v1::PlanAppendRequest& args, int64_t at) const;
  v1::AppendPlan MakePlan(const SessionEntry& session, int64_t at, int64_t count) const;
  void OnBegun(uint64_t append_id, const Answered& answered, int64_t now_ms);
  void OnSealed(uint64_t append_id, const Answered& answered, int64_t now_ms);
  void OnRecorded(uint64_t append_id, uint64_t session_id, const AppendRecord& record,
                  const absl::Status& status, int64_t now_ms);
  void OnPublished(uint64_t append_id, const Answered& answered, int64_t now_ms);
  void FinishComparison(Append* append, int64_t now_ms);
  void ReplyReceipt(Append* append);
  // Tells the workers, answers whoever waits, forgets it.
  void Undo(uint64_t append_id, const absl::Status& status, int64_t now_ms);
  void Forget(uint64_t append_id);
  absl::Status NoSuchAppend(uint64_t append_id) const;

  Group* const group_;
  Sessions* const sessions_;
  Journal* const journal_;
  Outbox* const outbox_;
  std::map<uint64_t, Append> appends_;
  std::unordered_map<uint64_t, uint64_t> of_session_;  // Session id -> id of the append under way.
  uint32_t next_ = 1;                                  // Within the epoch.
  // Receipts for commits whose answer may have been lost, oldest first.
  std::deque<std::pair<uint64_t, v1::AppendReceipt>> receipts_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_APPENDS_H_
