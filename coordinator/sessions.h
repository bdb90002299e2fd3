#ifndef EDUBA_COORDINATOR_SESSIONS_H_
#define EDUBA_COORDINATOR_SESSIONS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/group.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "coordinator/records.h"
#include "coordinator/settlement.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

struct SessionEntry {
  enum class Phase {
    kOpening,    // Workers are being told; it is not written down yet.
    kRecording,  // It is being written down.
    kReady,
    kErasing,  // It is being struck out.
    kClosing,  // It is struck out; workers are being told.
  };

  SessionRecord record;
  std::shared_ptr<const v1::SessionSpec> spec;  // record.spec, shared with calls
  Phase phase = Phase::kReady;
  // All ranks of this epoch hold exactly record.length() positions of it, and take commands on it.
  bool here = false;
  // Which nodes lack what of its content, as a sentence: found when the last epoch began. Empty: nothing is
  // known to be missing.
  std::string lost;
  std::vector<LostStripes> lost_stripes;  // The same, counted.
  uint64_t open_epoch = 0;                // The last epoch whose workers were told of the session.
  int64_t recorded = 0;                   // Positions of a model session that are written down.
  RequestId waiter = 0;                   // The request that waits for the creation or deletion.
};

// Which sessions there are: created, listed, forked, deleted. A new session is told to the workers, then
// written down, then the client's; a deleted one is struck out, then closed on the workers.
class Sessions {
 public:
  Sessions(StoredState stored, Group* group, Journal* journal, Outbox* outbox);

  // ---- Calls
  void Create(RequestId request, const v1::CreateSessionRequest& args, int64_t unix_ms, int64_t now_ms);
  void Get(RequestId request, const v1::GetSessionRequest& args);
  void List(RequestId request, const v1::ListSessionsRequest& args);
  // `parent` takes commands, and no call extends it.
  void Fork(RequestId request, const SessionEntry& parent, const std::string& name, int64_t unix_ms,
            int64_t now_ms);
  // `on_kept` is called when it could not be struck out, and goes on.
  void Delete(RequestId request, SessionEntry* session, std::function<void(int64_t now_ms)> on_kept);
  void Cancel(RequestId request);

  // ---- Epochs. Sessions that were being made have failed, what was being closed is closed.
  void OnOver(const std::string& why);

  // ---- For the other machines. Pointers hold until the next event.
  // Ready ones: NOT_FOUND, ABORTED while it is being created.
  absl::StatusOr<SessionEntry*> Find(const std::string& name);
  // Also checks that its content is here: DATA_LOSS names what is missing, UNAVAILABLE asks to retry.
  absl::StatusOr<SessionEntry*> FindUsable(const std::string& name);
  absl::StatusOr<SessionEntry*> FindTensor(const std::string& name);  // FAILED_PRECONDITION: it is a model's.
  absl::StatusOr<SessionEntry*> FindModel(const std::string& name);   // FAILED_PRECONDITION: it is not.
  SessionEntry* ById(uint64_t id);                                    // Null: there is none.
  std::vector<SessionEntry*> All();                                   // By name.
  // Over the group's nodes; sessions begin on different ones.
  Placement Place(uint64_t session_id, const v1::SessionSpec& spec, int64_t version) const;

 private:
  absl::Status CheckNew(const std::string& name) const;
  SessionEntry* Add(RequestId waiter, const std::string& name, v1::SessionSpec spec, int64_t unix_ms);
  v1::Session Describe(const SessionEntry& session) const;
  void OnOpened(uint64_t session_id, const Answered& answered, int64_t now_ms);
  void OnRecorded(uint64_t session_id, const absl::Status& status, int64_t now_ms);
  void OnErased(uint64_t session_id, const absl::Status& status,
                const std::function<void(int64_t now_ms)>& on_kept, int64_t now_ms);
  void CloseOnWorkers(uint64_t session_id, int64_t now_ms);
  void OnClosed(uint64_t session_id);
  void Forget(uint64_t session_id);

  Group* const group_;
  Journal* const journal_;
  Outbox* const outbox_;
  std::map<std::string, SessionEntry> sessions_;  // By name.
  std::unordered_map<uint64_t, std::string> names_;
  uint64_t next_id_;
};

// What the workers are told when a session is made or opened again.
v1::Command OpenCommand(const SessionRecord& record);

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_SESSIONS_H_
