#include "model/paged_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "attention/sharded_attention.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// What StepArgs::positions is for a row: the same for every way in which the row can come. The bits after
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
  std::vector<Part> shared;
  int64_t step_row = 0;
  int64_t output_row = 0;
  for (size_t c = 0; c < contexts_.size(); ++c) {
    const ContextRows& context = contexts_[c];
    for (int64_t row = 0; row < context.rows;) {
      const int64_t end = std::min(context.rows, PositionsFor(context.first + row) - context.first);
      Part part{c, output_row, context.owner, InputsFor(rows, context, row, end - row, step_row)};
      if (IsAnsweredHere(context.owner)) output_row += end - row;
      if (IsShared(context.views[rows.layer])) {
        shared.push_back(std::move(part));
      } else {
        EDUBA_RETURN_IF_ERROR(AttendParts(rows, nullptr, absl::MakeConstSpan(&part, 1), outputs));
      }
      row = end;
    }
    step_row += context.rows;
  }
  EDUBA_CHECK_EQ(step_row, rows.rows);
  return shared.empty() ? absl::OkStatus() : AttendParts(rows, communicator_, shared, outputs);
}

int64_t PagedAttention::RowBytes(const AttentionShape& shape, int64_t sink_tokens) {
  // Words of both paths, units and maxima of the maximum path; queries rounded to pairs; of each path a
  // target; references, maxima, selections; logits of sinks.
  const int64_t head = int64_t{2} * 8 * (shape.value_dim + 2) + int64_t{12} * shape.value_dim +
                       int64_t{4} * (shape.head_dim + 1) + 2 * 24 + 48 + 8 * sink_tokens;
  // Visible keys, twice, and sinks.
  return shape.query_heads * head + 48;
}

StepInputs PagedAttention::InputsFor(const LayerRows& rows, const ContextRows& context, int64_t row,
                                     int64_t count, int64_t step_row) const {
  const KvPages& pages = *context.pages;
  const LayerView& view = context.views[rows.layer];
  const int64_t first = context.first + row;
  const int64_t first_query = (step_row + row) * pages.shape().query_heads * pages.shape().head_dim;
  StepArgs common;
  common.shape = pages.shape();
  common.queries = rows.queries + first_query;
  if (rows.sink_queries != rows.queries) common.sink_queries = rows.sink_queries + first_query;
  common.exponents = model_->value_exponents(rows.layer);
  common.positions = PositionsFor(first);

  std::vector<int64_t> positions(count);
  std::iota(positions.begin(), positions.end(), first);
  StepPages from{&pages.table(rows.layer), &pages.table(rows.layer)};
  if (IsShared(view)) {
    from.placement = &pages.placement();
    from.index = pages.index();
  }
  return StepInputs(common, view, positions, first + count, from);
}

absl::Status PagedAttention::AttendParts(const LayerRows& rows, Communicator* communicator,
                                         absl::Span<const Part> parts, float* outputs) {
  std::vector<StepArgs> steps;
  std::vector<int> owners;
  steps.reserve(parts.size());
  for (const Part& part : parts) {
    steps.push_back(part.inputs.args);
    if (part.owner >= 0) owners.push_back(part.owner);
  }
  EDUBA_ASSIGN_OR_RETURN(const std::vector<AttentionAnswer> answers,
                         AttendPages(*backend_, communicator, steps, owners, deadline_));
  for (size_t i = 0; i < parts.size(); ++i) {
    bytes_read_ += answers[i].bytes_read;
    if (!IsAnsweredHere(parts[i].owner)) continue;
    const AttentionShape& shape = parts[i].inputs.args.shape;
    std::copy(answers[i].outputs.begin(), answers[i].outputs.end(),
              outputs + parts[i].output_row * shape.query_heads * shape.value_dim);
    AddSinkMass(rows, parts[i].context, answers[i].sink_mass);
  }
  return absl::OkStatus();
}

void PagedAttention::AddSinkMass(const LayerRows& rows, size_t context, absl::Span<const float> mass) {
  const auto layers = static_cast<int64_t>(model_->config().layers.size());
  const int64_t heads = contexts_[context].pages->shape().query_heads;
  sink_mass_.resize(contexts_.size() * layers * heads);
  int64_t* sums = &sink_mass_[(static_cast<int64_t>(context) * layers + rows.layer) * heads];
  for (size_t i = 0; i < mass.size(); ++i) {
    sums[i % heads] += std::llrint(double{mass[i]} / kSinkMassUnit);
  }
}

}  // namespace eduba
