#ifndef EDUBA_MODEL_PAGED_ATTENTION_H_
#define EDUBA_MODEL_PAGED_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "attention/visibility.h"
#include "collective/communicator.h"
#include "kernels/backend.h"
#include "model/kv_pages.h"
#include "model/layer_attention.h"
#include "model/transformer.h"

namespace eduba {

// Which keys a row sees in one layer (attention/visibility.h).
struct LayerView {
  Policy policy = Policy::kGlobal;
  int64_t sink_tokens = 0;
  int64_t window = 0;  // kWindow only.
};

// Neighbouring rows of a step that belong to one context.
struct ContextRows {
  KvPages* pages = nullptr;  // With room for the rows.
  int64_t first = 0;         // Position of the first row; the others follow. The context is `first` long.
  int64_t rows = 0;
  absl::Span<const LayerView> views;  // One a layer.
};

// Attention of contexts for one step. Layers whose pages are shared between ranks are merged with the others,
// which must all run the same step; other layers need nobody. A row's bits depend on its position and on
// what it sees, not on which rows came with it or on who holds what: channel exponents come from the weights
// (Transformer::value_exponents), and the maximum path's unit from the row's own position.
class PagedAttention final : public LayerAttention {
 public:
  // What a step is merged with.
  struct Group {
    Communicator* communicator = nullptr;  // Null: every layer's pages are here.
    absl::Time deadline = absl::InfiniteFuture();
  };

  // All outlive the object. The contexts' rows lie one after another in the step's.
  PagedAttention(Backend* backend, const Transformer* model, absl::Span<const ContextRows> contexts,
                 const Group& group)
      : backend_(backend), model_(model), contexts_(contexts), group_(group) {}

  // INVALID_ARGUMENT when the arithmetic left the finite numbers: all ranks get it. After any other error the
  // group is dead, as after AttendSharded's.
  absl::Status Attend(const LayerRows& rows, float* outputs) override;

  // Sums over rows of [layers, query_heads]: the token sinks' share of the weights.
  const std::vector<double>& sink_mass() const { return sink_mass_; }
  // Keys and values read.
  int64_t bytes_read() const { return bytes_read_; }
  // With the group.
  int64_t collectives() const { return collectives_; }

 private:
  absl::Status AttendPart(const LayerRows& rows, const ContextRows& context, int64_t row, int64_t count,
                          int64_t step_row, float* outputs);

  Backend* const backend_;
  const Transformer* const model_;
  const absl::Span<const ContextRows> contexts_;
  const Group group_;
  std::vector<double> sink_mass_;
  int64_t bytes_read_ = 0;
  int64_t collectives_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_PAGED_ATTENTION_H_
