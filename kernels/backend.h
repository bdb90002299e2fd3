#ifndef EDUBA_KERNELS_BACKEND_H_
#define EDUBA_KERNELS_BACKEND_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "base/pages.h"

namespace eduba {

// One layer's attention. REQUIRES: all counts > 0, query_heads % kv_heads == 0, scale finite, softcap >= 0
// and finite. Query head h reads KV head h / (query_heads / kv_heads).
struct AttentionShape {
  int query_heads = 1;
  int kv_heads = 1;
  int head_dim = 1;
  int value_dim = 1;
  DType key_dtype = DType::kF32;    // The stored keys' type; queries are f32.
  DType value_dtype = DType::kF32;  // The stored values' type.
  float scale = 1;                  // logit = scale * (q . k), natural units (weights are exp(logit)).
  float softcap = 0;                // > 0: logit = softcap * tanh(scale * (q . k) / softcap). 0: none.

  // Query heads that read the same KV head.
  int gqa_group() const { return query_heads / kv_heads; }
  bool operator==(const AttentionShape&) const = default;
};

// The first bytes of every page in backend memory. What is reserved is zero today: the place is for the
// scales and bounds of the page's keys and values, so that a page need not change its size for them.
struct PageHeader {
  uint8_t is_sealed = 0;  // By SealPage, where pages are host memory.
  char reserved[63] = {};
};
static_assert(sizeof(PageHeader) == 64);

// Words of a live mask: bit r % 64 of word r / 64 is row r of the page.
inline constexpr int kLiveWords = kPageRows / 64;

// One page of one layer in backend memory; `index` is the absolute page index (positions [256 index, 256
// index + 256)).
struct PageRef {
  const void* data = nullptr;
  int64_t index = 0;
  // [kLiveWords] in host memory, or null where all rows are live. What a dead row holds (NaN, zeros) changes
  // no bit of any answer, and a page without a live row is as if it were not there.
  const uint64_t* live = nullptr;
};

// Rows [begin, end) of the page StepArgs::pages[page].
struct ListedPage {
  int32_t page = 0;
  int16_t begin = 0;
  int16_t end = kPageRows;
};

// Which pages each row of a step reads, in the form of paged KV tables (indptr and indices). Rows may share a
// list. A list names a page once at most, in any order; kernels/page_lists.h makes the list of all pages.
struct PageLists {
  absl::Span<const int32_t> indptr;      // [lists + 1]: list i is entries [indptr[i], indptr[i + 1])
  absl::Span<const ListedPage> entries;  // [indptr[lists]]
  absl::Span<const int32_t> row_list;    // [rows]: the list of each row
};

// One step: `rows` query rows of one layer against this worker's pages. Everything here but `pages` and
// `lists` is the same on every rank. All spans and pointers are host memory, except the pages' data; all must
// outlive the step.
//
// A row sees a position where three things agree: its list names the page and the row of the page, `visible`
// holds the position, and the page's live mask does.
struct StepArgs {
  AttentionShape shape;
  int rows = 0;
  const float* queries = nullptr;  // [rows, query_heads, head_dim], finite
  // The same rows as the token sinks are to be scored with (rolling positions turn them by another angle), or
  // none: `queries`.
  const float* sink_queries = nullptr;
  // [rows]: the keys that a row may see, token sinks left out (may be empty). Pages' lists and masks only
  // take away from it.
  absl::Span<const PositionRange> visible;
  absl::Span<const PageRef> pages;  // This worker's pages, any order; pages that no row sees are skipped.
  PageLists lists;                  // The lists that rows have of `pages`.
  // Replicated: pages that hold positions [0, sink tokens), in order. The sinks that a row sees are live.
  absl::Span<const PageRef> sink_pages;
  absl::Span<const int32_t> visible_sinks;  // [rows]: row r sees token sinks [0, visible_sinks[r])
  absl::Span<const float> sink_logits;      // Learned sinks: empty, or [query_heads]
  absl::Span<const int16_t> exponents;      // [kv_heads, value_dim]: |v[., c]| <= 2^e[c] over the live rows
  int64_t positions = 0;                    // Committed length of the sequence: fixes F' of the maximum path.
  int64_t first_row = 0;                    // What messages call the first row.
  // Looked at between units of work, if set; may become true on any thread. Calls of the step may return
  // CANCELLED then, and what they have made so far is worth nothing.
  const std::atomic<bool>* cancelled = nullptr;

  // Whether there may be a sink path at all; the same on every rank.
  bool has_sinks() const { return !sink_logits.empty() || !sink_pages.empty(); }
  int64_t row_heads() const { return int64_t{rows} * shape.query_heads; }
  // What AttentionStep says of one row and head: words of SinkSums and MaximumSums, floats of Maxima.
  int64_t words_per_row_head() const { return int64_t{shape.value_dim} + 2; }
  int64_t maxima_per_row_head() const { return int64_t{shape.value_dim} + 1; }
};

// Fraction bits of the sink path (docs/numerics.md).
inline constexpr int kSinkPathFractionBits = 46;
// Totals of l outside [2^-10, 2^10], in units of 2^-46, leave the sink path.
inline constexpr int64_t kSinkPathMin = int64_t{1} << (kSinkPathFractionBits - 10);
inline constexpr int64_t kSinkPathMax = int64_t{1} << (kSinkPathFractionBits + 10);
// The flag word of a row and head: each rank adds 1 when its own sum left the range, and kFaultFlag when a
// logit, weight or value was not finite; both contribute zeros otherwise. 64 ranks cannot carry from one into
// the other.
inline constexpr int64_t kFaultFlag = int64_t{1} << 32;

// How a step's rows and heads were merged; the same on every rank.
struct PathCounts {
  int64_t sink = 0;     // Sink path (also: no visible key at all, so nothing to merge).
  int64_t maximum = 0;  // Maximum path.
};

// The sink path of a step on a GPU (Backend::gpu), as one queue of work without the host in between.
class QueuedStep {
 public:
  virtual ~QueuedStep() = default;

  // In place of SinkSums: queues the same sums, on Backend::stream, into `words` of the GPU's memory: [rows,
  // query_heads, value_dim + 2], which stay until SelectForMaximum has returned. Null: into memory of the
  // step's own, where there is nobody to sum with. Where a flag is not 0, the other words of the row and head
  // mean nothing, and may wrap around.
  virtual absl::Status QueueSums(int64_t* words) = 0;
  // Queues all that SelectForMaximum and Finish need of the reduced words, after the all-reduce that the
  // caller has queued on the same stream.
  virtual absl::Status QueueFinalise() = 0;
};

// One step in progress. Calls in this order (the caller owns the collectives between them):
//   Attend; [SinkSums, all-reduce SUM of `words`]; SelectForMaximum; [Maxima, MAX of `maxima`; MaximumSums,
//   SUM of `words`, if any selected]; Finish.
// SinkSums is skipped on every rank when the step has no sink of any kind. Where only one rank gets the sums
// and the answer, the others call TakeSelection for SelectForMaximum, and end before Finish. The spans that a
// call fills are the caller's host memory: they are reduced in place, so that many steps can share a message,
// and hold the reduced numbers until the step is gone.
class AttentionStep {
 public:
  virtual ~AttentionStep() = default;

  // Reads the visible keys and values of `pages` once, and keeps one partial per (row, head, page):
  //   m = max logit, l = sum exp(s - m), o[c] = sum exp(s - m) v[c], over the page's visible rows, fp32,
  //   fixed order.
  // Non-finite arithmetic is remembered, not returned here: every rank must still take part in the
  // collective.
  virtual absl::Status Attend() = 0;

  // [rows, query_heads, value_dim + 2] int64: value_dim words O[c] = rint(o[c] exp(m - M) 2^(46 - e[c])), the
  // word L = rint(l exp(m - M) 2^46), both summed over this worker's pages, and the flag word. M = the row's
  // largest sink logit.
  virtual absl::Status SinkSums(absl::Span<int64_t> words) = 0;

  // Reads the reduced sums (or, without sinks, nothing) and decides per row and head, from the integer totals
  // alone, which need the maximum path: out of range, or too coarse for the row's output. Returns them as row
  // * query_heads + head, ascending; a row whose `visible` is empty is never among them.
  virtual absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() = 0;

  // For a rank that has sinks and not the reduced sums: what SelectForMaximum has returned on the one that
  // has.
  virtual absl::Status TakeSelection(absl::Span<const int64_t> row_heads) = 0;

  // [selected, 1 + value_dim] f32, in the order of SelectForMaximum: this worker's largest visible key logit
  // (-inf where it has no visible key, +inf after a fault), then for each channel how large a page's o[c] may
  // be: the largest ln|o[c]| + m over its pages, rounded up a little (-inf where all are 0).
  virtual absl::Status Maxima(absl::Span<float> maxima) = 0;

  // [selected, value_dim + 2] int64, as SinkSums, but with the reduced maximum M' for M, in L
  // F' = 62 - ceil(log2(positions + 1)) for 46, and in O units that come from the reduced magnitudes instead
  // of `exponents`: the finest that no sum can overflow (docs/numerics.md section 3). Uses the partials that
  // Attend kept; a backend that had no room for them computes them again, to the same bits.
  virtual absl::Status MaximumSums(absl::Span<int64_t> words) = 0;

  // Adds the token sinks and learned sinks, computed in double, divides, and writes to host memory:
  //   outputs [rows, query_heads, value_dim], lse [rows, query_heads] (natural log), sink_mass [rows,
  //   query_heads] (the sinks' share of the denominator, learned sink included). A row that sees no key and
  //   no sink: 0, -inf, 0.
  // INVALID_ARGUMENT when any rank met non-finite arithmetic; the rank that met it names the page and row in
  // the message, the others say it was another rank. Nothing is written then.
  virtual absl::Status Finish(float* outputs, float* lse, float* sink_mass) = 0;

  // This step's way to stay on its GPU between Attend and SelectForMaximum; null where there is none.
  virtual QueuedStep* queued() { return nullptr; }

  virtual PathCounts paths() const = 0;
  // Bytes of keys and values that Attend read: rows that some query row sees, per page and KV head, counted
  // once.
  virtual int64_t bytes_read() const = 0;
};

// One device's kernels. Page memory functions may be called from any thread (on different pages). Any number
// of steps may be in progress, one call at a time among them all.
class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu/AVX2", "cuda/sm_90", "reference".
  virtual std::string name() const = 0;

  // CUDA's number of the GPU that steps run on, and the stream (cudaStream_t) of their work; -1 and null
  // where they run on the host.
  virtual int gpu() const { return -1; }
  virtual void* stream() const { return nullptr; }

  // Not OK once the device has failed for good: then every call fails, and only a new process can use the
  // device again.
  virtual absl::Status health() const { return absl::OkStatus(); }

  // Zeroed memory for pages, aligned to 64 bytes at least. RESOURCE_EXHAUSTED when the device has none left.
  virtual absl::StatusOr<void*> AllocateSlab(int64_t bytes) = 0;
  virtual void FreeSlab(void* slab, int64_t bytes) = 0;

  // Bytes of one page of one layer, a multiple of 64: a PageHeader, then keys and values in a layout of the
  // backend's own.
  virtual int64_t PageBytes(const AttentionShape& shape) const = 0;
  // Makes a page's memory ready for another page: its header is as in memory fresh from AllocateSlab, which
  // needs no call. Keys and values stay what they are.
  virtual absl::Status ResetPage(void* page) = 0;
  // Called once, when no row of the page will be written any more before ResetPage. A WriteRows after it is a
  // mistake of the caller: backends whose pages are host memory abort on it. The copy that CopyPage makes of
  // a sealed page is not sealed.
  virtual absl::Status SealPage(const AttentionShape& shape, void* page) = 0;
  // Writes rows [row, row + rows) of a page. keys [rows, kv_heads, head_dim] in shape.key_dtype and values
  // [rows, kv_heads, value_dim] in shape.value_dtype are host arrays. Returns when the arrays may be reused.
  virtual absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                                 const void* values) = 0;
  // Reads them back into such arrays, bit for bit as they were written.
  virtual absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                                void* values) = 0;
  virtual absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) = 0;

  virtual absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_BACKEND_H_
