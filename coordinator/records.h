#ifndef EDUBA_COORDINATOR_RECORDS_H_
#define EDUBA_COORDINATOR_RECORDS_H_

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "base/digest.h"
#include "base/placement.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// One committed append. Of token ids, which workers keep and compare themselves, the digest is 0.
struct AppendRecord {
  int64_t at = 0;
  int64_t count = 0;
  Digest digest;

  bool operator==(const AppendRecord&) const = default;
};

// What survives a restart of the coordinator. `appends` tile [0, length) in order.
struct SessionRecord {
  uint64_t id = 0;  // never reused
  std::string name;
  v1::SessionSpec spec;  // completed
  // Which nodes keep its content. No nodes: it was recorded by a release that knew none.
  Placement placement;
  int64_t created_unix_ms = 0;
  std::vector<AppendRecord> appends;

  int64_t length() const { return appends.empty() ? 0 : appends.back().at + appends.back().count; }
};

// One start of a coordinator with these records. Terms are numbered from 1; the nonce tells two starts from
// each other that took the same number, from two copies of the records.
struct Term {
  uint64_t number = 0;
  uint64_t nonce = 0;

  bool operator==(const Term&) const = default;
};

struct StoredState {
  uint64_t cluster = 0;  // Drawn once for each store: whose session ids these are.
  uint64_t epoch = 0;    // the last one that was begun
  uint64_t next_session_id = 1;
  std::vector<Term> terms;  // Ascending; the last is this coordinator's.
  std::vector<SessionRecord> sessions;
};

// The changes that are written down, each wholly or not at all.
struct EpochBegun {
  uint64_t epoch = 0;
};
struct SessionCreated {
  SessionRecord session;  // a fork with its appends; its id becomes used
};
struct SessionErased {
  uint64_t session_id = 0;
};
struct AppendCommitted {
  uint64_t session_id = 0;
  AppendRecord append;
};
// An empty session gets other nodes.
struct SessionPlaced {
  uint64_t session_id = 0;
  Placement placement;
};
using Change = std::variant<EpochBegun, SessionCreated, SessionErased, AppendCommitted, SessionPlaced>;

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RECORDS_H_
