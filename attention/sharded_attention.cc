#include "attention/sharded_attention.h"

#include <algorithm>
#include <memory>

#include "base/check.h"
#include "base/pages.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// The pages that hold positions of `range`.
absl::Span<const PageRef> PagesOf(absl::Span<const PageRef> pages, PositionRange range) {
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  const auto begin = std::lower_bound(pages.begin(), pages.end(), PageOf(range.begin), before);
  const auto end = std::lower_bound(begin, pages.end(), PageCount(range.end), before);
  return pages.subspan(begin - pages.begin(), end - begin);
}

// Everything up to the last collective.
absl::Status Merge(AttentionStep& step, Communicator* communicator, const StepArgs& args, bool has_sinks,
                   absl::Time deadline, AttentionAnswer& answer) {
  EDUBA_RETURN_IF_ERROR(step.Attend());
  if (has_sinks) {
    EDUBA_ASSIGN_OR_RETURN(const absl::Span<int64_t> sums, step.SinkSums());
    if (communicator != nullptr) EDUBA_RETURN_IF_ERROR(communicator->SumI64(sums, deadline));
    ++answer.collectives;
  }
  EDUBA_ASSIGN_OR_RETURN(const absl::Span<const int64_t> selected, step.SelectForMaximum());
  for (const int64_t row_head : selected) ++answer.row_heads_maximum[row_head / args.shape.query_heads];
  if (selected.empty()) return absl::OkStatus();
  EDUBA_ASSIGN_OR_RETURN(const absl::Span<float> maxima, step.Maxima());
  if (communicator != nullptr) EDUBA_RETURN_IF_ERROR(communicator->MaxF32(maxima, deadline));
  EDUBA_ASSIGN_OR_RETURN(const absl::Span<int64_t> sums, step.MaximumSums());
  if (communicator != nullptr) EDUBA_RETURN_IF_ERROR(communicator->SumI64(sums, deadline));
  answer.collectives += 2;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttentionAnswer> AttendPages(Backend& backend, Communicator* communicator,
                                            const StepArgs& args, bool has_sinks, absl::Time deadline) {
  AttentionAnswer answer;
  const int64_t rows = args.rows;
  answer.row_heads_maximum.resize(rows);
  answer.outputs.resize(rows * args.shape.query_heads * args.shape.value_dim);
  answer.lse.resize(rows * args.shape.query_heads);
  answer.sink_mass.resize(rows * args.shape.query_heads);
  auto step = backend.StartStep(args);
  const absl::Status merged =
      step.ok() ? Merge(**step, communicator, args, has_sinks, deadline, answer) : step.status();
  if (!merged.ok()) {
    if (communicator != nullptr) communicator->Abort(merged);
    return merged;
  }
  // Non-finite arithmetic travels inside the sums: every rank learns of it here, and none is waiting.
  EDUBA_RETURN_IF_ERROR((*step)->Finish(answer.outputs.data(), answer.lse.data(), answer.sink_mass.data()));
  answer.bytes_read = (*step)->bytes_read();
  return answer;
}

absl::StatusOr<AttentionAnswer> AttendSharded(Backend& backend, Communicator& communicator,
                                              const Sequence& sequence, const AttentionQuery& query,
                                              absl::Time deadline) {
  const SequenceSpec& spec = sequence.spec();
  const auto rows = static_cast<int64_t>(query.positions.size());
  EDUBA_CHECK(query.layer >= 0 && query.layer < spec.layers);
  EDUBA_CHECK(query.length >= 1 && query.length <= sequence.length());
  EDUBA_CHECK_EQ(static_cast<int64_t>(query.queries.size()),
                 rows * spec.shape.query_heads * spec.shape.head_dim);

  std::vector<PositionRange> visible(rows);
  std::vector<int32_t> visible_sinks(rows);
  PositionRange seen{INT64_MAX, 0};  // By any row.
  for (int64_t row = 0; row < rows; ++row) {
    const Visibility v =
        VisibleTo(query.policy, query.positions[row], spec.sink_tokens, spec.window, query.length);
    visible[row] = v.keys;
    visible_sinks[row] = v.sinks;
    if (!v.keys.empty()) seen = {std::min(seen.begin, v.keys.begin), std::max(seen.end, v.keys.end)};
  }

  StepArgs args;
  args.shape = spec.shape;
  args.rows = static_cast<int>(rows);
  args.queries = query.queries.data();
  args.visible = visible;
  if (!seen.empty()) args.pages = PagesOf(sequence.pages(query.layer).refs(), seen);
  args.sink_pages = sequence.sink_pages(query.layer).refs();
  args.visible_sinks = visible_sinks;
  args.sink_logits = spec.sink_logits;
  args.exponents = sequence.exponents(query.layer, query.length);
  args.positions = query.length;
  args.first_row = query.first_row;
  args.cancelled = query.cancelled;

  return AttendPages(backend, &communicator, args, spec.has_sinks(), deadline);
}

}  // namespace eduba
