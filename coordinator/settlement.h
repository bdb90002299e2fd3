#ifndef EDUBA_COORDINATOR_SETTLEMENT_H_
#define EDUBA_COORDINATOR_SETTLEMENT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "coordinator/records.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// What of a session one node should keep, and does not.
struct LostStripes {
  std::string node;
  int64_t stripes = 0;
  int64_t positions = 0;

  bool operator==(const LostStripes&) const = default;
};

// What becomes of a session when a group forms again.
struct Settlement {
  // Its content is here, `length` positions. For SettleSession: the exponents with which a sealed append is
  // published, and whether the ranks of a model session must read its ids again.
  int64_t length = 0;
  std::string exponents;
  bool read_again = false;
  // Its content is not here: why, as a sentence, and what is missing. Empty: it is.
  std::string why_lost;
  std::vector<LostStripes> lost;
};

// Compares what is on record with what the ranks hold (SessionContent of each, by rank). Tensor sessions:
// every rank must hold, or get by publishing its sealed append, exactly the recorded positions, and the
// digests must add up. Model sessions: ranks that stand at one place go on from there, also when it is past
// the record; otherwise they go back to the record. REQUIRES: one content for each node of record.placement.
Settlement Settle(const SessionRecord& record, const std::vector<v1::SessionContent>& contents);

// No rank of the group was asked, because `absent` nodes of its placement are not in the group.
Settlement SettleWithout(const SessionRecord& record, const std::vector<std::string>& absent);

// Takes the maximum of two little-endian int16 arrays, element by element. False when the sizes differ.
bool MergeExponents(const std::string& from, std::string* into);

// Bytes of a session's exponents. REQUIRES: a completed spec.
size_t ExponentBytes(const v1::SessionSpec& spec);

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_SETTLEMENT_H_
