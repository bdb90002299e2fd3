#include "model/paged_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "attention/sharded_attention.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// What StepArgs::positions is for a row: the same for every way in which the row can come. The bits behind
// the binary point that a larger number costs are not missed below 2^16.
int64_t PositionsFor(int64_t position) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(position + 1, 1 << 16))));
}

}  // namespace

absl::Status PagedAttention::Attend(const LayerRows& rows, float* outputs) {
  const AttentionShape& shape = contexts_[0].pages->shape();
  const int64_t key_row = int64_t{shape.kv_heads} * shape.head_dim;
  int64_t step_row = 0;
  for (const ContextRows& context : contexts_) {
    EDUBA_RETURN_IF_ERROR(
        context.pages->Write(rows.layer, context.first,
                             context.pages->Round(context.rows, rows.keys + step_row * key_row,
                                                  rows.values + step_row * key_row)));
    step_row += context.rows;
  }
  return AttendWritten(rows, outputs);
}

absl::Status PagedAttention::AttendWritten(const LayerRows& rows, float* outputs) {
  int64_t step_row = 0;
  for (const ContextRows& context : contexts_) {
    for (int64_t row = 0; row < context.rows;) {
      const int64_t end = std::min(context.rows, PositionsFor(context.first + row) - context.first);
      EDUBA_RETURN_IF_ERROR(AttendPart(rows, context, row, end - row, step_row + row, outputs));
      row = end;
    }
    step_row += context.rows;
  }
  EDUBA_CHECK_EQ(step_row, rows.rows);
  return absl::OkStatus();
}

absl::Status PagedAttention::AttendPart(const LayerRows& rows, const ContextRows& context, int64_t row,
                                        int64_t count, int64_t step_row, float* outputs) {
  const LayerView& view = context.views[rows.layer];
  const AttentionShape& shape = context.pages->shape();
  const int64_t first = context.first + row;
  const int64_t length = first + count;
  std::vector<PositionRange> visible(count);
  std::vector<int32_t> visible_sinks(count);
  PositionRange seen{INT64_MAX, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Visibility v = VisibleTo(view.policy, first + i, view.sink_tokens, view.window, length);
    visible[i] = v.keys;
    visible_sinks[i] = v.sinks;
    if (!v.keys.empty()) seen = {std::min(seen.begin, v.keys.begin), std::max(seen.end, v.keys.end)};
  }

  const int64_t query_row = int64_t{shape.query_heads} * shape.head_dim;
  StepArgs args;
  args.shape = shape;
  args.rows = static_cast<int>(count);
  args.queries = rows.queries + step_row * query_row;
  if (rows.sink_queries != rows.queries) args.sink_queries = rows.sink_queries + step_row * query_row;
  args.visible = visible;
  // A window's pages are all here; of all pages, each rank adds up its own.
  Communicator* const communicator = view.policy == Policy::kGlobal ? communicator_ : nullptr;
  std::vector<PageRef> owned;
  if (communicator != nullptr) {
    owned = context.pages->OwnedPages(rows.layer, seen);
    args.pages = owned;
  } else {
    args.pages = context.pages->Pages(rows.layer, seen);
  }
  args.sink_pages = context.pages->Pages(rows.layer, {0, std::min(view.sink_tokens, length)});
  args.visible_sinks = visible_sinks;
  args.exponents = model_->value_exponents(rows.layer);
  args.positions = PositionsFor(first);
  EDUBA_ASSIGN_OR_RETURN(const AttentionAnswer answer,
                         AttendPages(*backend_, communicator, args, view.sink_tokens > 0, deadline_));
  std::copy(answer.outputs.begin(), answer.outputs.end(), outputs + step_row * query_row);
  AddSinkMass(rows, context, answer.sink_mass);
  bytes_read_ += answer.bytes_read;
  return absl::OkStatus();
}

void PagedAttention::AddSinkMass(const LayerRows& rows, const ContextRows& context,
                                 absl::Span<const float> mass) {
  const auto layers = static_cast<int64_t>(model_->config().layers.size());
  const int64_t heads = context.pages->shape().query_heads;
  sink_mass_.resize(contexts_.size() * layers * heads);
  int64_t* sums = &sink_mass_[((&context - contexts_.data()) * layers + rows.layer) * heads];
  for (size_t i = 0; i < mass.size(); ++i) {
    sums[i % heads] += std::llrint(double{mass[i]} / kSinkMassUnit);
  }
}

}  // namespace eduba
