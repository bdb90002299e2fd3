#include "worker/attend_step.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/sharded_attention.h"
#include "base/elements.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// What is wrong with the step whatever a rank holds: every rank finds the same, so none enters a collective.
absl::Status CheckStep(const v1::AttendStep& step, const SequenceSpec& spec) {
  const AttentionShape& shape = spec.shape;
  if (step.rows() < 1 || step.rows() > kStepRowsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("step has ", step.rows(), " rows, wanted 1 to ", kStepRowsMax));
  }
  if (step.layer() < 0 || step.layer() >= spec.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", step.layer(), ", wanted 0 to ", spec.layers - 1));
  }
  if (step.positions_size() != step.rows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("step of ", step.rows(), " rows has ", step.positions_size(), " positions"));
  }
  const size_t query_bytes = sizeof(float) * step.rows() * shape.query_heads * shape.head_dim;
  if (step.queries().size() != query_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("queries have ", step.queries().size(), " bytes, wanted ", query_bytes));
  }
  if (step.policy() != v1::POLICY_GLOBAL && step.policy() != v1::POLICY_WINDOW) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", static_cast<int>(step.policy()), " is not known"));
  }
  if (step.policy() == v1::POLICY_WINDOW && spec.window == 0) {
    return absl::InvalidArgumentError("policy is window, but the session was created without --window");
  }
  for (const int64_t position : step.positions()) {
    if (position < 0 || position >= step.length()) {
      return absl::OutOfRangeError(
          absl::StrCat("query position is ", position, ", wanted 0 to ", step.length() - 1));
    }
  }
  const auto elements = static_cast<int64_t>(query_bytes / sizeof(float));
  if (FirstNonFinite(step.queries().data(), DType::kF32, elements) >= 0) {
    return absl::InvalidArgumentError("queries have a NaN or Inf, wanted finite numbers");
  }
  return absl::OkStatus();
}

AttentionQuery QueryOf(const v1::AttendStep& step, const std::atomic<bool>& cancelled) {
  AttentionQuery query;
  query.layer = step.layer();
  query.policy = step.policy() == v1::POLICY_WINDOW ? Policy::kWindow : Policy::kGlobal;
  query.length = step.length();
  query.queries = absl::MakeConstSpan(reinterpret_cast<const float*>(step.queries().data()),
                                      step.queries().size() / sizeof(float));
  query.positions = absl::MakeConstSpan(step.positions().data(), step.positions_size());
  query.first_row = step.first_row();
  query.cancelled = &cancelled;
  return query;
}

}  // namespace

absl::StatusOr<v1::AttendResult> Attend(Backend& backend, Membership& membership, const Sequence* sequence,
                                        const v1::AttendStep& step, absl::Time deadline) {
  const int64_t length = sequence == nullptr ? 0 : sequence->length();
  if (step.length() < 1 || step.length() > length) {
    // The other ranks may know the session and be on their way into the collective.
    return membership.EndIfBroken(
        absl::AbortedError(absl::StrCat("step on ", step.length(), " positions of session ",
                                        step.session_id(), ", of which this worker knows ", length)));
  }
  EDUBA_RETURN_IF_ERROR(CheckStep(step, sequence->spec()));
  const auto attended = AttendSharded(backend, membership.communicator(), *sequence,
                                      QueryOf(step, membership.cancelled()), deadline);
  if (absl::IsCancelled(attended.status())) return membership.over();
  if (!attended.ok()) return membership.EndIfBroken(BrokenGroup(attended.status()));
  const AttentionAnswer& answer = *attended;
  v1::AttendResult result;
  if (membership.communicator().rank() == 0) {
    result.set_outputs(BytesOf(answer.outputs));
    result.set_lse(BytesOf(answer.lse));
    result.set_sink_mass(BytesOf(answer.sink_mass));
    result.set_row_heads_maximum(BytesOf(answer.row_heads_maximum));
  }
  result.set_bytes_read(answer.bytes_read);
  result.set_collectives(answer.collectives);
  return result;
}

absl::Status BrokenGroup(const absl::Status& status) {
  if (absl::IsInvalidArgument(status) || absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) {
    return status;
  }
  return absl::AbortedError(std::string(status.message()));
}

}  // namespace eduba
