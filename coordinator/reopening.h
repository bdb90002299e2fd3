#ifndef EDUBA_COORDINATOR_REOPENING_H_
#define EDUBA_COORDINATOR_REOPENING_H_

#include <cstdint>
#include <string>
#include <vector>

#include "coordinator/group.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "coordinator/sessions.h"
#include "coordinator/settlement.h"

namespace eduba {

// Brings the sessions into a new epoch. Content outlives epochs: when a group has formed,
//   1. workers are told which sessions there are (RetainSessions), and drop all others;
//   2. every session is opened, and each rank says what it holds of it (OpenSession -> SessionContent);
//   3. what they say is compared with the record (settlement.h), and either the ranks settle on one length
//      (SettleSession) or the session is lost for this epoch. It is looked at anew in the next.
// When no session waits for 2 or 3 any more, the coordinator serves.
class Reopening {
 public:
  Reopening(Group* group, Sessions* sessions, Journal* journal, Outbox* outbox)
      : group_(group), sessions_(sessions), journal_(journal), outbox_(outbox) {}

  // The group is active, and no command has been sent yet.
  void OnActive(int64_t now_ms);
  void OnOver();
  // No session waits.
  bool serving() const { return serving_; }
  // Tries again to place what the disk did not take.
  void Tick(int64_t now_ms);

 private:
  void Begin(SessionEntry* session, int64_t now_ms);
  // An empty session gets the nodes of this group.
  void PlaceAnew(const SessionEntry& session);
  void Open(SessionEntry* session, int64_t now_ms);
  void OnOpened(uint64_t session_id, const Answered& answered, int64_t now_ms);
  // Writes down what a model session's ranks have read past the record.
  void Adopt(SessionEntry* session, const Settlement& settlement, int64_t now_ms);
  void SettleOnWorkers(SessionEntry* session, const Settlement& settlement, int64_t now_ms);
  void Lose(SessionEntry* session, const Settlement& settlement);
  // The session waits no longer.
  void Ended();

  Group* const group_;
  Sessions* const sessions_;
  Journal* const journal_;
  Outbox* const outbox_;
  // Sessions for which the coordinator does not serve yet, and OnActive itself.
  int64_t waiting_ = 0;
  bool serving_ = false;
  std::vector<uint64_t> unplaced_;  // Sessions whose new nodes could not be written down.
  int64_t place_at_ms_ = 0;         // Not before.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_REOPENING_H_
