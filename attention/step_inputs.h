#ifndef EDUBA_ATTENTION_STEP_INPUTS_H_
#define EDUBA_ATTENTION_STEP_INPUTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/page_table.h"
#include "attention/visibility.h"
#include "base/pages.h"
#include "base/placement.h"
#include "kernels/backend.h"
#include "kernels/page_lists.h"

namespace eduba {

// Which pages a step reads.
struct StepPages {
  const PageTable* keys = nullptr;
  const PageTable* sinks = nullptr;  // With the pages that hold the token sinks.
  // The step reads only those pages of `keys` that node `index` of this placement owns. Null: all pages.
  const Placement* placement = nullptr;
  int index = 0;
};

// The arguments of one step of the backend, and the arrays that they point to. Movable: the arrays stay where
// they are.
struct StepInputs {
  // Rows at `positions` of a sequence of `length` positions see what `view` says. Of `common`, all that is
  // not about visible keys and pages: shape, queries, sink logits, exponents, positions, first row, and what
  // can cancel it.
  StepInputs(const StepArgs& common, const LayerView& view, absl::Span<const int64_t> positions,
             int64_t length, const StepPages& pages);
  StepInputs(StepInputs&&) = default;
  StepInputs& operator=(StepInputs&&) = default;

  StepArgs args;
  std::vector<PositionRange> visible;
  std::vector<int32_t> visible_sinks;
  std::vector<PageRef> owned;
  OwnedPageLists lists;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_STEP_INPUTS_H_
