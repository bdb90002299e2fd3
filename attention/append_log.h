#ifndef EDUBA_ATTENTION_APPEND_LOG_H_
#define EDUBA_ATTENTION_APPEND_LOG_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "base/digest.h"
#include "base/pages.h"

namespace eduba {

// Which part of an append a worker takes.
struct AppendShare {
  int64_t at = 0;  // The append is positions [at, at + count).
  int64_t count = 0;
  // The positions that this worker owns, disjoint, in any order. Each begins at a page's first position or at
  // `at`, and ends at a page's end or at the append's.
  std::vector<PositionRange> owned;
  bool compare_only = false;  // A retry of positions that are committed: digest what comes, store nothing.
};

// What a worker says of an append when it has all its rows.
struct AppendSeal {
  // The sum of PageWriter::DigestOf over the owned rows of all layers: the same for any chunking and, added
  // up over the workers, for any placement.
  Digest digest;
  // Sequence::owned_exponents as they will be after the append.
  std::vector<int16_t> exponents;
};

// What happens to the appends of one sequence, in order: an append begins, its rows come, it is sealed and
// published; then the next one begins. StagedAppend writes it down through this interface
// (storage/session_log.h), and the same interface takes it when it is read again.
class AppendLog {
 public:
  virtual ~AppendLog() = default;

  // REQUIRES: no other append has begun and is neither published nor cut off. `share` stores something.
  virtual absl::Status Begin(const AppendShare& share) = 0;
  // Positions [first, first + count) of a layer, in the sequence's types: keys [count, kv_heads, head_dim]
  // and values [count, kv_heads, value_dim]. From any number of threads, between Begin and Seal.
  virtual absl::Status AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                               absl::Span<const char> values) = 0;
  virtual absl::Status Seal(const AppendSeal& seal) = 0;
  // [layers, kv_heads, value_dim], as given to StagedAppend::Publish.
  virtual absl::Status Publish(absl::Span<const int16_t> exponents) = 0;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_APPEND_LOG_H_
