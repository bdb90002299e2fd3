#ifndef EDUBA_ATTENTION_SHARDED_ATTENTION_H_
#define EDUBA_ATTENTION_SHARDED_ATTENTION_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "attention/sequence.h"
#include "attention/visibility.h"
#include "collective/communicator.h"
#include "kernels/backend.h"

namespace eduba {

// Query rows of one layer, the same on every rank.
struct AttentionQuery {
  int layer = 0;
  Policy policy = Policy::kGlobal;
  int64_t length = 0;                            // Positions the rows may see, 1 to the sequence's length.
  absl::Span<const float> queries;               // [rows, query_heads, head_dim], finite
  absl::Span<const int64_t> positions;           // [rows], each below `length`
  int64_t first_row = 0;                         // What messages call the first row.
  const std::atomic<bool>* cancelled = nullptr;  // Means what StepArgs::cancelled means.
};

struct AttentionAnswer {
  std::vector<float> outputs;              // [rows, query_heads, value_dim]
  std::vector<float> lse;                  // [rows, query_heads], natural log
  std::vector<float> sink_mass;            // [rows, query_heads]
  std::vector<int32_t> row_heads_maximum;  // [rows]: heads of the row that took the maximum path.
  int64_t bytes_read = 0;                  // The bytes of keys and values that this worker read.
  int collectives = 0;                     // The collectives that its sums and maxima took part in.
};

// The half of AttendSharded that is not about sequences: steps over pages that the caller chose, merged with
// the other ranks of `communicator`; null: with nobody, for keys that are all here. All steps share the
// collectives, each of which is as long as theirs together: one, or three where any row of any step needs the
// maximum path. A step's answer is what it would be alone. Errors as AttendSharded; INVALID_ARGUMENT is the
// first step's whose arithmetic left the finite numbers.
//
// `owners` [steps], ascending, or empty: step i is rank owners[i]'s, and only that rank gets its sums and its
// answer; the others' is empty but for `bytes_read` and `collectives`, and an INVALID_ARGUMENT is the owner's
// alone. A sum is then a reduce-scatter. Where there are sinks, one more collective tells all ranks what the
// owners have selected for the maximum path, a bit for each row and head.
absl::StatusOr<std::vector<AttentionAnswer>> AttendPages(Backend& backend, Communicator* communicator,
                                                         absl::Span<const StepArgs> steps,
                                                         absl::Span<const int> owners, absl::Time deadline);

// One step of docs/numerics.md: every rank reads its own pages, the sums meet in one all-reduce (three where
// a row needs the maximum path, two without sinks), and every rank gets the same answer.
//
// INVALID_ARGUMENT when the arithmetic left the finite numbers; all ranks get it, and the group lives on.
// CANCELLED when `cancelled` became true. Any other error is this rank's own or the communicator's, and the
// communicator is dead then: an error before a collective aborts it, so that no rank waits for a rank that
// will not come.
absl::StatusOr<AttentionAnswer> AttendSharded(Backend& backend, Communicator& communicator,
                                              const Sequence& sequence, const AttentionQuery& query,
                                              absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_ATTENTION_SHARDED_ATTENTION_H_
