#ifndef EDUBA_COORDINATOR_STORE_H_
#define EDUBA_COORDINATOR_STORE_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/records.h"

struct sqlite3;

namespace eduba {

// The coordinator's durable state in one SQLite file, DIR/coordinator.sqlite (write-ahead log, synchronous =
// FULL: what Apply returned OK for survives a power cut). Owned by one process: a second store on the same
// directory is refused. Not thread-safe.
class Store {
 public:
  // Opens or creates it; an empty `data_dir` keeps everything in memory. Errors name the file:
  //   FAILED_PRECONDITION  another coordinator uses the directory, or a newer Eduba wrote it
  //   DATA_LOSS            the file is not what a coordinator wrote (truncated, damaged, another program's)
  //   UNAVAILABLE          the directory or file cannot be created, read or written
  static absl::StatusOr<std::unique_ptr<Store>> Open(const std::string& data_dir);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  absl::StatusOr<StoredState> Load();
  // One transaction: after an error nothing of it is stored. RESOURCE_EXHAUSTED when the disk is full.
  absl::Status Apply(const Change& change);

 private:
  explicit Store(std::string path) : path_(std::move(path)) {}

  absl::Status Initialise();
  absl::Status Execute(const std::string& sql);
  absl::Status Error(int code, const std::string& doing) const;
  friend class Statement;

  std::string path_;
  sqlite3* db_ = nullptr;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_STORE_H_
