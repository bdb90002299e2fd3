#ifndef EDUBA_COORDINATOR_BATCHER_H_
#define EDUBA_COORDINATOR_BATCHER_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "coordinator/effects.h"

namespace eduba {

// Rows of calls that agree in all of this may share a step.
struct BatchKey {
  uint64_t session_id = 0;
  int layer = 0;
  int64_t length = 0;
  v1::Policy policy = v1::POLICY_GLOBAL;
  bool positions = false;  // rows bring their own; otherwise all are at length - 1

  bool operator==(const BatchKey&) const = default;
};

// Rows on their way to one step.
struct Batch {
  struct Part {
    RequestId call = 0;
    int rows = 0;
    int64_t first_row = 0;  // number of the first one in its call
  };
  BatchKey key;
  int rows = 0;
  std::string queries;             // f32 [rows, query_heads, head_dim], as they came
  std::vector<int64_t> positions;  // [rows]
  std::vector<Part> parts;         // whose rows, in order
  bool again = false;              // one call's share of a step that failed, by itself
};

// Packs the queued rows of many calls into steps. A step takes the kind of rows whose call has waited
// longest, and shares its room equally between the calls of that kind, so that a huge call cannot starve a
// small one. A call's rows leave in the order in which they came.
class Batcher {
 public:
  // `row_bytes` of queries per row; at most `step_rows` rows of this kind in one step.
  void Open(RequestId call, const BatchKey& key, int64_t row_bytes, int step_rows);
  // `positions` is empty exactly when the key says so. REQUIRES: an open call, whole rows.
  void Push(RequestId call, std::string queries, std::vector<int64_t> positions);
  // Forgets the call and its queued rows. Unknown calls are ignored.
  void Close(RequestId call);

  bool empty() const { return waiting_.empty(); }
  // REQUIRES: !empty().
  Batch Next();

 private:
  struct Submitted {
    std::string queries;
    std::vector<int64_t> positions;
    int64_t rows = 0;
    int64_t taken = 0;
  };
  struct Call {
    BatchKey key;
    int64_t row_bytes = 0;
    int step_rows = 0;
    std::deque<Submitted> submitted;
    int64_t queued = 0;
    int64_t left = 0;  // rows that have gone to steps
  };

  static void Take(Call* call, int64_t rows, Batch* batch);

  std::unordered_map<RequestId, Call> calls_;
  std::deque<RequestId> waiting_;  // the calls with queued rows, longest wait first
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_BATCHER_H_
