#ifndef EDUBA_COORDINATOR_STORE_H_
#define EDUBA_COORDINATOR_STORE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/recorder.h"
#include "coordinator/records.h"

struct sqlite3;

namespace eduba {

// The coordinator's memory beyond its life: an SQLite database, DIR/eduba.db. A change is on the disk when
// Apply returns OK (WAL, synchronous=FULL), and wholly absent otherwise. Not thread-safe.
class Store final : public Recorder {
 public:
  // Creates the folder and the database when they are missing; an empty `dir` keeps all in memory.
  //   UNAVAILABLE          another coordinator has the database open
  //   FAILED_PRECONDITION  a newer release wrote it
  //   DATA_LOSS            it cannot be read
  static absl::StatusOr<std::unique_ptr<Store>> Open(const std::string& dir);
  ~Store() override;
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // DATA_LOSS when what is there makes no sense, or is not what was written.
  absl::StatusOr<StoredState> Load();
  // A coordinator begins to use the records: its term is the last of StoredState::terms from now on. Before
  // Load, once. FAILED_PRECONDITION where DIR/eduba.witness knows of a later term than the database: an
  // earlier copy was put back, or its write-ahead log is lost.
  absl::Status BeginTerm();
  // RESOURCE_EXHAUSTED when the disk is full.
  absl::Status Apply(const Change& change);
  // All changes in one transaction, so that they cost one wait for the disk. If that fails, each is tried by
  // itself.
  std::vector<absl::Status> ApplyAll(const std::vector<Change>& changes) override;

 private:
  Store(std::string path, sqlite3* db);

  absl::Status Prepare();
  absl::Status Execute(const char* sql);
  absl::Status Error(int code, const std::string& doing) const;
  absl::Status ApplyInTransaction(const std::vector<Change>& changes);
  absl::Status ApplyOne(const Change& change);
  absl::Status AddAppend(uint64_t session_id, const AppendRecord& append);
  absl::Status SetMeta(const char* key, uint64_t value);
  // Brings the hash of a session's row up to date, and the number of sessions.
  absl::Status HashSession(uint64_t session_id);
  absl::Status CountSessions();

  class Statement;

  const std::string path_;
  sqlite3* const db_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_STORE_H_
