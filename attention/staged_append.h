#ifndef EDUBA_ATTENTION_STAGED_APPEND_H_
#define EDUBA_ATTENTION_STAGED_APPEND_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/page_store.h"
#include "attention/sequence.h"
#include "base/digest.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// Which part of an append a worker takes.
struct AppendShare {
  int64_t at = 0;  // The append is positions [at, at + count).
  int64_t count = 0;
  // The positions that this worker owns, ascending, disjoint. Each begins at a page's first position or at
  // `at`, and ends at a page's end or at the append's.
  std::vector<PositionRange> owned;
  bool compare_only = false;  // A retry of positions that are committed: digest what comes, store nothing.
};

struct AppendSeal {
  // Sum modulo 2^128, over the owned (layer, position) rows, of XXH3_128 of {position int64, layer int64,
  // stored K row, stored V row}: the same for any chunking and, added up over the workers, for any placement.
  Digest digest;
  // Sequence::owned_exponents as they will be after the append.
  std::vector<int16_t> exponents;
};

// An append on its way into a sequence: rows come in any order from any number of threads, are rounded,
// checked and written to pages that no query can see, until Publish puts them into the sequence. Dropping it
// drops its pages.
//
// AddRows and Abort may be called from any thread; Begin, Seal and Publish read or change the sequence and
// belong on its thread. The sequence must live until the append is aborted or gone.
class StagedAppend {
 public:
  // Reserves all pages that the share needs: its own, the token sinks', and copies of the tail pages that the
  // append continues.
  //   RESOURCE_EXHAUSTED   they do not fit; nothing was reserved
  //   FAILED_PRECONDITION  the append does not start at the sequence's end (compare_only: does not lie within
  //   it) INVALID_ARGUMENT     the share is not as AppendShare says
  static absl::StatusOr<std::shared_ptr<StagedAppend>> Begin(Backend* backend, PageStore* store,
                                                             Sequence* sequence, AppendShare share);

  // Takes positions [first, first + count) of one layer: keys [count, kv_heads, head_dim] and values [count,
  // kv_heads, value_dim] of type `dtype`, rounded to the sequence's, nearest even. The first error ends the
  // append: every later call repeats it.
  //   INVALID_ARGUMENT     NaN or Inf (also after rounding), wrong sizes, positions that are neither owned
  //   nor token
  //                        sinks, or that were sent before
  //   FAILED_PRECONDITION  the append is sealed
  //   ABORTED              the append was aborted
  absl::Status AddRows(int layer, int64_t first, int64_t count, DType dtype, absl::Span<const char> keys,
                       absl::Span<const char> values);

  // Closes the append once all its rows are here. FAILED_PRECONDITION names the first one missing; more may
  // follow then. After a success: the same answer again.
  absl::StatusOr<AppendSeal> Seal();
  // Whether Seal has succeeded. Rows and exponents are final from then on: the append may wait for its
  // Publish as long as its sequence stays at `share().at`, through the end of a group and the next one's
  // beginning.
  bool sealed() const;
  // What Seal returned. REQUIRES: sealed().
  AppendSeal seal() const;

  // Puts the rows into the sequence, with the exponents that all workers agreed on ([layers, kv_heads,
  // value_dim], the largest of their seals'). Once, after Seal; compare_only changes nothing.
  absl::Status Publish(std::vector<int16_t> exponents);

  // Gives the memory back; later uploads are refused. Waits for those under way.
  void Abort();

  const Sequence& sequence() const { return *sequence_; }
  const AppendShare& share() const { return share_; }

 private:
  // A run of positions that must come (owned or token sinks), at `offset` among all that must.
  struct Run {
    PositionRange range;
    int64_t offset = 0;
  };
  // Consecutive staged pages of every layer: those of positions in `range`, `slot` being the first one's
  // number among the layer's staged pages.
  struct Extent {
    PositionRange range;
    int64_t slot = 0;
  };

  StagedAppend(Backend* backend, Sequence* sequence, AppendShare share);

  absl::Status CheckShare() const;
  void PlanRuns();
  absl::Status StagePages(PageStore* store);
  // Of claimed_, per layer.
  int64_t Words() const { return (rows_ + 63) / 64; }
  // Into pages_.
  int64_t StagedSlot(int layer, const Extent& extent, int64_t page) const;
  // AddRows after the state is known to be open.
  absl::Status Receive(int layer, int64_t first, int64_t count, DType dtype, absl::Span<const char> keys,
                       absl::Span<const char> values);
  absl::Status CheckSizes(int64_t count, DType dtype, absl::Span<const char> keys,
                          absl::Span<const char> values) const;
  absl::StatusOr<const Run*> FindRun(int64_t first, int64_t count) const;
  absl::Status Claim(int layer, const Run& run, int64_t first, int64_t count);
  absl::Status NonFinite(const char* array, DType stored, int layer, int64_t first, int64_t dim,
                         int64_t index, float given) const;
  absl::Status Write(int layer, const Extent& extent, int64_t first, int64_t count, const char* keys,
                     const char* values);
  void Record(int layer, PositionRange rows, int64_t first, const char* keys, const char* values);
  absl::Status FirstMissing() const;

  Backend* const backend_;
  Sequence* const sequence_;
  const AppendShare share_;
  const int64_t key_bytes_;    // Of one stored position, all KV heads.
  const int64_t value_bytes_;  // Likewise.

  std::vector<Run> runs_;        // Ascending; neighbours are merged.
  int64_t rows_ = 0;             // Per layer, that must come.
  std::vector<Extent> extents_;  // The owned ranges; neighbours are merged.
  Extent sinks_;                 // Token sinks of this append.
  int64_t slots_ = 0;            // Staged pages per layer.
  std::vector<Page> pages_;      // [layers, slots]; empty when compare_only.
  std::vector<std::atomic<uint64_t>>
      claimed_;  // [layers, words]: a bit per row that must come, set when it does.

  // Held shared while rows come in, alone while the state changes.
  mutable std::shared_mutex state_mutex_;
  bool sealed_ = false;
  AppendSeal seal_;  // Once sealed.
  // Rows of one page are written one after another: a layout may keep several rows in one word.
  std::array<std::mutex, 64> page_mutexes_;

  std::mutex mutex_;  // Guards all below.
  absl::Status failure_;
  Digest digest_;
  std::vector<uint32_t> magnitudes_;  // [layers, kv_heads, value_dim], of the owned rows.
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_STAGED_APPEND_H_
