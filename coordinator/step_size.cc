#include "coordinator/step_size.h"

#include <algorithm>

#include "base/pages.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// A worker keeps one partial per row, head and page: what a step may make it hold.
constexpr int64_t kPartialBytesMax = int64_t{256} << 20;
// Multiply-adds of one step on the busiest rank: about four seconds of two slow cores (8e9 a second each), so
// that calls take turns, and what nobody wants any more is soon over. Enough for a step to be matrix work: 18
// rows of 50 million cells of 64 + 16 numbers.
constexpr int64_t kStepWorkMax = int64_t{1} << 36;

// Multiply-adds that a rank gets through in a millisecond however slow it is: a twentieth of one slow core. A
// rank that is slower is taken for hung although its heart beats.
constexpr int64_t kSlowestWorkPerMs = (int64_t{1} << 28) / 1000;

// The most pages of one node that a row sees.
int64_t VisiblePages(const v1::SessionSpec& spec, const Placement& placement, const BatchKey& key) {
  const int64_t pages = PagesOfBusiestOwner(placement, key.length);
  // Rows with positions of their own may see different windows; together they may read every page.
  if (key.policy != v1::POLICY_WINDOW || key.positions) return pages;
  return std::min(pages, PageCount(spec.window()) + 1);
}

}  // namespace

int64_t RowWork(const v1::SessionSpec& spec, const Placement& placement, const BatchKey& key) {
  int64_t keys = VisiblePages(spec, placement, key) * kPageRows;
  if (key.policy == v1::POLICY_WINDOW) keys = std::min(keys, spec.window());
  return (keys + spec.sink_tokens()) * spec.query_heads() * (int64_t{spec.head_dim()} + spec.value_dim());
}

int64_t StepExtraMs(int64_t work) { return work / kSlowestWorkPerMs; }

int StepRows(const v1::SessionSpec& spec, const Placement& placement, const BatchKey& key) {
  // Outputs, lse and sink mass of each row and head, and a path count.
  const int64_t answer_bytes = int64_t{4} * (spec.query_heads() * (int64_t{spec.value_dim()} + 2) + 1);
  const int64_t query_bytes = int64_t{4} * spec.query_heads() * spec.head_dim();
  const int64_t partial_bytes =
      int64_t{4} * spec.query_heads() * (int64_t{spec.value_dim()} + 2) * VisiblePages(spec, placement, key);
  const int64_t rows =
      std::min({int64_t{kStepRowsMax}, kPayloadBytesMax / answer_bytes, kPayloadBytesMax / query_bytes,
                kPartialBytesMax / partial_bytes, kStepWorkMax / RowWork(spec, placement, key)});
  return static_cast<int>(std::max<int64_t>(1, rows));
}

}  // namespace eduba
