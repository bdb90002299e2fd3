#ifndef EDUBA_MODEL_PAGED_ATTENTION_H_
#define EDUBA_MODEL_PAGED_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "attention/step_inputs.h"
#include "attention/visibility.h"
#include "collective/communicator.h"
#include "kernels/backend.h"
#include "kernels/page_lists.h"
#include "model/kv_pages.h"
#include "model/layer_attention.h"
#include "model/transformer.h"

namespace eduba {

// One unit of sink mass in a sum over rows: kMaxPositions rows of mass 1 are 2^62.
inline constexpr double kSinkMassUnit = 0x1p-32;

// Neighbouring rows of a step that belong to one context.
struct ContextRows {
  KvPages* pages = nullptr;  // With room for the rows.
  int64_t first = 0;         // Position of the first row; the others follow. The context is `first` long.
  int64_t rows = 0;
  absl::Span<const LayerView> views;  // One a layer.
  // The rank that gets the answers, alone; -1: all do. All contexts of a step alike, ranks in their order.
  int owner = -1;
};

// Attention of contexts for one step, on one worker or on the ranks of a group that all take the same step.
// Windows are on every rank; where a row sees all keys, each rank adds up those of the pages that it owns,
// and the sums of all contexts meet in one all-reduce a layer, three where any row needs the maximum path
// (docs/numerics.md), or in reduce-scatters where each context is one rank's. A row's bits depend on its
// position and on what it sees, not on which rows came with it, nor on the number of ranks: channel exponents
// come from the weights (Transformer::value_exponents), and the maximum path's unit from the row's own
// position.
class PagedAttention final : public LayerAttention {
 public:
  // All outlive the object. The contexts' rows lie one after another in the step's. `communicator` is null
  // where this worker owns all pages; `deadline` is for its collectives.
  PagedAttention(Backend* backend, const Transformer* model, absl::Span<const ContextRows> contexts,
                 Communicator* communicator, absl::Time deadline)
      : backend_(backend),
        model_(model),
        contexts_(contexts),
        communicator_(communicator),
        deadline_(deadline) {}

  absl::Status Attend(const LayerRows& rows, float* outputs) override;
  // Attends with rows whose keys and values are in the pages already; `rows.keys` and `rows.values` are null.
  // Where the contexts have owners, `outputs` takes the rows of those that are this rank's, one after the
  // other, and an INVALID_ARGUMENT is theirs. REQUIRES of owners: rows that see all keys.
  absl::Status AttendWritten(const LayerRows& rows, float* outputs);
  // Host memory that AttendWritten takes, at most, for one more row that another rank owns.
  static int64_t RowBytes(const AttentionShape& shape, int64_t sink_tokens);

  // [contexts, layers, query_heads]: the token sinks' share of the weights, summed over the context's rows,
  // in units of kSinkMassUnit: integers, so that a sum over many steps does not depend on how they were cut.
  const std::vector<int64_t>& sink_mass() const { return sink_mass_; }
  // The bytes of keys and values that this worker has read.
  int64_t bytes_read() const { return bytes_read_; }

 private:
  // Neighbouring rows of a context that one step of the backend takes.
  struct Part {
    size_t context = 0;
    int64_t output_row = 0;
    int owner = -1;  // ContextRows::owner
    StepInputs inputs;
  };

  bool IsAnsweredHere(int owner) const { return owner < 0 || owner == communicator_->rank(); }
  // A window's pages are all here; of all pages, each rank adds up its own.
  bool IsShared(const LayerView& view) const {
    return communicator_ != nullptr && view.policy == Policy::kGlobal;
  }
  // The inputs for rows [row, row + count) of the context, whose first row is row `step_row` of the step.
  StepInputs InputsFor(const LayerRows& rows, const ContextRows& context, int64_t row, int64_t count,
                       int64_t step_row) const;
  // Together with the other ranks, or with nobody.
  absl::Status AttendParts(const LayerRows& rows, Communicator* communicator, absl::Span<const Part> parts,
                           float* outputs);
  // `mass` [rows of the context, query_heads].
  void AddSinkMass(const LayerRows& rows, size_t context, absl::Span<const float> mass);

  Backend* const backend_;
  const Transformer* const model_;
  const absl::Span<const ContextRows> contexts_;
  Communicator* const communicator_;
  const absl::Time deadline_;
  std::vector<int64_t> sink_mass_;
  int64_t bytes_read_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_PAGED_ATTENTION_H_
