#include "cli/model_text.h"

#include "absl/strings/str_format.h"

namespace eduba {

std::string PolicyText(const v1::ModelSpec& model) {
  if (model.policy() == v1::MODEL_POLICY_STREAMING) return "streaming";
  return model.policy() == v1::MODEL_POLICY_STAR ? "star" : "model";
}

std::string PositionsText(const v1::ModelSpec& model) {
  if (model.positions() == v1::POSITION_MODE_ROLLING) return "rolling";
  return model.positions() == v1::POSITION_MODE_CLAMPED ? "clamped" : "absolute";
}

std::string ModelSpecText(const v1::ModelSpec& model) {
  return absl::StrFormat("policy %s, %s positions, window %d, %d sink tokens", PolicyText(model),
                         PositionsText(model), model.window(), model.sink_tokens());
}

}  // namespace eduba
