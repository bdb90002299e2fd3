#include "rpc/spec.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/dtype.h"
#include "base/elements.h"
#include "base/status_macros.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

absl::Status CheckBound(const char* field, int64_t found, int64_t low, int64_t high) {
  if (found >= low && found <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", found, ", wanted ", low, " to ", high));
}

absl::Status CheckModelPart(const v1::ModelSpec& spec) {
  if (!v1::ModelPolicy_IsValid(spec.policy()) || !v1::PositionMode_IsValid(spec.positions())) {
    return absl::InvalidArgumentError("the model policy or position mode is not known");
  }
  const bool windowed = spec.policy() != v1::MODEL_POLICY_MODEL;
  EDUBA_RETURN_IF_ERROR(CheckBound("sink_tokens", spec.sink_tokens(), 0, kSinkTokensMax));
  EDUBA_RETURN_IF_ERROR(CheckBound(windowed ? "window" : "window (policy model has the model's own)",
                                   spec.window(), windowed ? 1 : 0, windowed ? int64_t{1} << 30 : 0));
  EDUBA_RETURN_IF_ERROR(CheckBound("clamp", spec.clamp(), 0, int64_t{1} << 30));
  if (spec.has_sink_token() && spec.sink_token() >= 0) {
    EDUBA_RETURN_IF_ERROR(
        CheckBound("sink_tokens (with a sink_token)", spec.sink_tokens(), 0, kDedicatedSinksMax));
  }
  if (spec.positions() != v1::POSITION_MODE_ABSOLUTE && spec.policy() != v1::MODEL_POLICY_STREAMING) {
    return absl::InvalidArgumentError(
        "rolling and clamped positions need the streaming policy: other layers see keys at every distance");
  }
  return absl::OkStatus();
}

// What `part` leaves out and its policy has a use for.
void FillIn(const v1::ModelSpec& defaults, v1::ModelSpec* part) {
  if (part->policy() == v1::MODEL_POLICY_UNSPECIFIED) part->set_policy(defaults.policy());
  const bool streaming = part->policy() == v1::MODEL_POLICY_STREAMING;
  if (part->window() == 0 && (streaming || part->policy() == v1::MODEL_POLICY_STAR)) {
    part->set_window(defaults.window());
  }
  if (part->positions() == v1::POSITION_MODE_UNSPECIFIED && streaming) {
    part->set_positions(defaults.positions());
  }
  if (!part->has_sink_tokens() && defaults.has_sink_tokens()) part->set_sink_tokens(defaults.sink_tokens());
  if (!part->has_sink_token() && defaults.has_sink_token()) part->set_sink_token(defaults.sink_token());
}

}  // namespace

int64_t DedicatedSinks(const v1::SessionSpec& spec) {
  const v1::ModelSpec& part = spec.model();
  return part.has_sink_token() && part.sink_token() >= 0 ? part.sink_tokens() : 0;
}

absl::StatusOr<v1::SessionSpec> CompleteModelSpec(const v1::SessionSpec& given, const v1::Model& model) {
  v1::SessionSpec own = given;
  own.clear_model();
  own.clear_stripe_pages();
  own.clear_notes();
  if (own.ByteSizeLong() > 0) {
    return absl::InvalidArgumentError(
        "a model session takes its layers, heads, dimensions, dtype, scale and softcap from the model, its "
        "sink "
        "tokens and window from the spec's model part: leave the fields beside it out");
  }
  v1::SessionSpec spec = given;
  spec.set_layers(model.layer_windows_size());
  spec.set_query_heads(model.query_heads());
  spec.set_kv_heads(model.kv_heads());
  spec.set_head_dim(model.head_dim());
  spec.set_dtype(model.dtype());
  v1::ModelSpec* part = spec.mutable_model();
  FillIn(model.session_defaults(), part);
  if (part->policy() == v1::MODEL_POLICY_UNSPECIFIED) part->set_policy(v1::MODEL_POLICY_MODEL);
  if (part->positions() == v1::POSITION_MODE_UNSPECIFIED) part->set_positions(v1::POSITION_MODE_ABSOLUTE);
  if (!part->has_sink_tokens()) part->set_sink_tokens(4);
  if (!part->has_sink_token()) part->set_sink_token(-1);
  EDUBA_RETURN_IF_ERROR(CheckBound("sink_token (-1: none)", part->sink_token(), -1, model.vocab_size() - 1));
  part->set_model_hash(model.hash());
  return CompleteSpec(spec);
}

int64_t ModelSessionBytes(const v1::SessionSpec& spec, const v1::Model& model, int64_t length) {
  const v1::ModelSpec& part = spec.model();
  const int64_t streaming = part.sink_tokens() + part.window();
  int64_t positions = 0;
  for (const int64_t window : model.layer_windows()) {
    int64_t kept = length;
    if (window > 0) kept = std::min(kept, window);
    if (part.policy() == v1::MODEL_POLICY_STREAMING) kept = std::min(kept, streaming);
    positions += kept;
  }
  return positions * PositionBytes(spec);
}

bool EveryLayerSeesAWindow(const v1::SessionSpec& spec, const v1::Model& model) {
  return spec.model().policy() == v1::MODEL_POLICY_STREAMING ||
         std::all_of(model.layer_windows().begin(), model.layer_windows().end(),
                     [](int64_t window) { return window > 0; });
}

absl::StatusOr<v1::SessionSpec> CompleteSpec(const v1::SessionSpec& given) {
  v1::SessionSpec spec = given;
  if (spec.layers() == 0) spec.set_layers(1);
  if (spec.value_dim() == 0) spec.set_value_dim(spec.head_dim());
  if (spec.dtype() == v1::DTYPE_UNSPECIFIED) spec.set_dtype(v1::DTYPE_F32);
  if (spec.stripe_pages() == 0) spec.set_stripe_pages(64);
  EDUBA_RETURN_IF_ERROR(DTypeFromProto(spec.dtype()).status());
  EDUBA_RETURN_IF_ERROR(CheckBound("layers", spec.layers(), 1, kLayersMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("query_heads", spec.query_heads(), 1, kQueryHeadsMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("kv_heads", spec.kv_heads(), 1, kQueryHeadsMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("head_dim", spec.head_dim(), 1, kHeadDimMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("value_dim", spec.value_dim(), 1, kHeadDimMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("sink_tokens", spec.sink_tokens(), 0, kSinkTokensMax));
  EDUBA_RETURN_IF_ERROR(CheckBound("window", spec.window(), 0, int64_t{1} << 30));
  EDUBA_RETURN_IF_ERROR(CheckBound("stripe_pages", spec.stripe_pages(), 1, kStripePagesMax));
  EDUBA_RETURN_IF_ERROR(
      CheckBound("notes' bytes", static_cast<int64_t>(spec.notes().size()), 0, kNotesBytesMax));
  if (spec.has_model()) EDUBA_RETURN_IF_ERROR(CheckModelPart(spec.model()));
  if (spec.query_heads() % spec.kv_heads() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("query_heads is ", spec.query_heads(),
                                                   ", wanted a multiple of kv_heads = ", spec.kv_heads()));
  }
  const int64_t row_elements = int64_t{spec.query_heads()} * std::max(spec.head_dim(), spec.value_dim());
  EDUBA_RETURN_IF_ERROR(
      CheckBound("query_heads * max(head_dim, value_dim)", row_elements, 1, kRowElementsMax));
  const int64_t kv_elements = int64_t{spec.kv_heads()} * (spec.head_dim() + spec.value_dim());
  EDUBA_RETURN_IF_ERROR(CheckBound("kv_heads * (head_dim + value_dim)", kv_elements, 1, kRowElementsMax));
  const int64_t exponent_bytes = int64_t{2} * spec.layers() * spec.kv_heads() * spec.value_dim();
  EDUBA_RETURN_IF_ERROR(
      CheckBound("2 * layers * kv_heads * value_dim", exponent_bytes, 1, kExponentBytesMax));
  if (!spec.has_scale()) spec.set_scale(1.0f / std::sqrt(static_cast<float>(spec.head_dim())));
  if (!std::isfinite(spec.scale())) {
    return absl::InvalidArgumentError(absl::StrCat("scale is ", spec.scale(), ", wanted a finite number"));
  }
  if (!std::isfinite(spec.softcap()) || spec.softcap() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("softcap is ", spec.softcap(), ", wanted a finite number >= 0 (0: none)"));
  }
  for (const float logit : spec.sink_logits()) {
    if (!std::isfinite(logit)) {
      return absl::InvalidArgumentError(absl::StrCat("a sink logit is ", logit, ", wanted finite numbers"));
    }
  }
  if (spec.sink_logits_size() == 1) {
    const float logit = spec.sink_logits(0);
    while (spec.sink_logits_size() < spec.query_heads()) spec.add_sink_logits(logit);
  }
  if (spec.sink_logits_size() != 0 && spec.sink_logits_size() != spec.query_heads()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sink_logits has ", spec.sink_logits_size(),
                     " values, wanted none, 1 or query_heads = ", spec.query_heads()));
  }
  return spec;
}

absl::Status CheckGenerateRequest(const v1::GenerateRequest& request, const v1::Model& model) {
  const std::string from = absl::StrCat("generation from session '", request.session(), "': ");
  if (request.max_tokens() < 1 || request.max_tokens() > kGenerateTokensMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(from, "max_tokens is ", request.max_tokens(), ", wanted 1 to ", kGenerateTokensMax));
  }
  if (request.time_limit_ms() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(from, "time_limit_ms is ", request.time_limit_ms(), ", wanted 0 or more"));
  }
  if (request.stop_ids_size() > kStopIdsMax || request.stop_strings_size() > kStopStringsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(from, request.stop_ids_size(), " stop ids and ", request.stop_strings_size(),
                     " stop strings, wanted at most ", kStopIdsMax, " and ", kStopStringsMax));
  }
  for (int i = 0; i < request.stop_ids_size(); ++i) {
    if (request.stop_ids(i) < 0 || request.stop_ids(i) >= model.vocab_size()) {
      return absl::InvalidArgumentError(absl::StrCat(from, "stop ids: id ", i, " is ", request.stop_ids(i),
                                                     ", wanted 0 to ", model.vocab_size() - 1));
    }
  }
  for (const std::string& string : request.stop_strings()) {
    if (string.empty() || static_cast<int64_t>(string.size()) > kStopStringBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat(from, "a stop string of ", string.size(),
                                                     " bytes, wanted 1 to ", kStopStringBytesMax));
    }
  }
  if (request.stop_strings_size() > 0 && model.tokenizer().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(from, "stop strings need a tokenizer, and the folder of model ", model.name(),
                     " has none; use stop ids"));
  }
  return absl::OkStatus();
}

absl::Status ValidateSessionName(const std::string& name) {
  const auto allowed = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  if (name.empty() || name.size() > 128 || !std::all_of(name.begin(), name.end(), allowed)) {
    return absl::InvalidArgumentError(absl::StrCat("session name of ", name.size(),
                                                   " bytes is not valid: use 1 to 128 of A-Z a-z 0-9 . _ -"));
  }
  return absl::OkStatus();
}

absl::StatusOr<DType> DTypeFromProto(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32:
      return DType::kF32;
    case v1::DTYPE_BF16:
      return DType::kBf16;
    case v1::DTYPE_F16:
      return DType::kF16;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("dtype ", static_cast<int>(dtype), " is not known: use f32, bf16 or f16"));
  }
}

v1::DType DTypeToProto(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::DTYPE_F32;
    case DType::kBf16:
      return v1::DTYPE_BF16;
    case DType::kF16:
      return v1::DTYPE_F16;
  }
  return v1::DTYPE_UNSPECIFIED;
}

int64_t PositionBytes(const v1::SessionSpec& spec) {
  const DType dtype = DTypeFromProto(spec.dtype()).value_or(DType::kF32);
  return RowBytesOf(dtype, spec.kv_heads(), spec.head_dim(), spec.value_dim()).total();
}

}  // namespace eduba
