#ifndef EDUBA_ATTENTION_STAGED_APPEND_H_
#define EDUBA_ATTENTION_STAGED_APPEND_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/append_log.h"
#include "attention/kv_page.h"
#include "attention/page_store.h"
#include "attention/sequence.h"
#include "base/digest.h"
#include "base/mutex.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// An append on its way into a sequence. Rows come in any order from any number of threads; they are rounded,
// checked and written to pages that no query can see, until Publish puts those pages into the sequence.
// Dropping the append drops its pages.
//
// AddRows, Abort, sealed and seal may be called from any thread; Begin, Seal and Publish read or change the
// sequence and belong on its thread. The sequence must live until the append is aborted or gone. An append
// belongs to no group: one that is sealed may be published in a later epoch, as long as the sequence still
// ends where it begins.
//
// With a log, all that it takes is written down there too; whoever drops the append cuts the log.
class StagedAppend {
 public:
  // Reserves all pages that the share needs: its own, the token sinks', and copies of the tail pages that the
  // append continues.
  //   RESOURCE_EXHAUSTED   they do not fit; nothing was reserved
  //   FAILED_PRECONDITION  the append does not start at the sequence's end (compare_only: does not lie
  //                        within it)
  //   INVALID_ARGUMENT     the share is not as AppendShare says
  // `log` null: nothing is written down, as is with compare_only. Else it outlives the append or its Abort;
  // its errors are this append's, here and below.
  static absl::StatusOr<std::shared_ptr<StagedAppend>> Begin(Backend* backend, PageStore* store,
                                                             Sequence* sequence, AppendShare share,
                                                             AppendLog* log = nullptr);
  // What happens from now on is written to `log`, which has all that happened so far. REQUIRES: no rows come
  // meanwhile; it began without a log.
  void ContinueIn(AppendLog* log) { log_ = log; }

  // Takes positions [first, first + count) of one layer: keys [count, kv_heads, head_dim] and values [count,
  // kv_heads, value_dim] of type `dtype`, rounded to the sequence's, nearest even. The first error ends the
  // append: every later call repeats it.
  //   INVALID_ARGUMENT     NaN or Inf (also after rounding), wrong sizes, positions that are neither owned
  //                        nor token sinks, or that were sent before
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
  // With the owned ranges in ascending order.
  const AppendShare& share() const { return share_; }

 private:
  // A run of positions that must come (owned or token sinks), at `offset` among all that must.
  struct Run {
    PositionRange range;
    int64_t offset = 0;
  };
  // Rows in the sequence's type, on their way into pages.
  struct TypedRows {
    int64_t first = 0;  // Position of the first row.
    const char* keys = nullptr;
    const char* values = nullptr;
  };

  StagedAppend(Backend* backend, Sequence* sequence, AppendShare share, AppendLog* log);

  absl::Status CheckShare() const;
  void PlanRuns();
  absl::Status StagePages(PageStore* store) ABSL_LOCKS_EXCLUDED(state_mutex_);
  // Words of claimed_ of one layer.
  int64_t Words() const { return (rows_ + 63) / 64; }
  // AddRows after the append is known to be open.
  absl::Status Receive(int layer, int64_t first, int64_t count, DType dtype, absl::Span<const char> keys,
                       absl::Span<const char> values) ABSL_SHARED_LOCKS_REQUIRED(state_mutex_);
  absl::Status CheckSizes(int64_t count, DType dtype, absl::Span<const char> keys,
                          absl::Span<const char> values) const;
  absl::StatusOr<const Run*> FindRun(int64_t first, int64_t count) const;
  absl::Status Claim(int layer, const Run& run, int64_t first, int64_t count);
  absl::Status CheckFinite(const char* array, DType dtype, int layer, int64_t first, int64_t dim,
                           int64_t elements, DType given_dtype, const char* given, const char* typed) const;
  // Writes positions `part` of `rows` to the pages of `table`, one of staged_ (compare_only: nowhere).
  // Returns their digest.
  absl::StatusOr<Digest> Write(int layer, PositionRange part, const TypedRows& rows, const PageTable* table)
      ABSL_SHARED_LOCKS_REQUIRED(state_mutex_);
  // Takes owned rows into what the seal will say.
  void Record(int layer, PositionRange part, const TypedRows& rows, const Digest& digest);
  absl::StatusOr<AppendSeal> SealLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(state_mutex_);
  absl::Status FirstMissing() const;

  const PageWriter writer_;
  Sequence* const sequence_;
  const AppendShare share_;
  AppendLog* log_;  // Null: none.

  std::vector<PositionRange> owned_;  // The owned ranges, ascending; neighbours are merged.
  PositionRange sinks_;               // Token sinks of this append.
  std::vector<Run> runs_;             // The owned rows and the sinks, ascending; neighbours are merged.
  int64_t rows_ = 0;                  // Per layer, that must come.
  // [layers, words]: a bit per row that must come, set when it does.
  std::vector<std::atomic<uint64_t>> claimed_;

  // Held shared while rows come in, alone while the state changes.
  mutable SharedMutex state_mutex_;
  std::vector<SequenceLayer> staged_ ABSL_GUARDED_BY(state_mutex_);  // [layers]; empty when compare_only.
  bool sealed_ ABSL_GUARDED_BY(state_mutex_) = false;
  AppendSeal seal_ ABSL_GUARDED_BY(state_mutex_);  // Once sealed.
  // Rows of one page are written one after another: a layout may keep several rows in one word.
  std::array<Mutex, 64> page_mutexes_;

  Mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  Digest digest_ ABSL_GUARDED_BY(mutex_);  // The owned rows' digest.
  std::vector<uint32_t> magnitudes_
      ABSL_GUARDED_BY(mutex_);  // [layers, kv_heads, value_dim], of the owned rows.
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_STAGED_APPEND_H_
