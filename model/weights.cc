#include "model/weights.h"

#include "base/status_macros.h"
#include "model/families/families.h"
#include "model/families/tensor_finder.h"

namespace eduba {

absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const Safetensors& tensors) {
  ModelWeights weights;
  weights.layers.resize(config.layers.size());
  TensorFinder find(tensors);
  if (config.family == ModelFamily::kGptNeoX) {
    FindGptNeoX(find, config, weights);
  } else {
    FindLlama(find, config, weights);
  }
  EDUBA_RETURN_IF_ERROR(find.Finish());
  return weights;
}

absl::StatusOr<LoadedModel> LoadModel(const std::string& folder) {
  LoadedModel model;
  EDUBA_ASSIGN_OR_RETURN(model.config, LoadModelConfig(folder));
  EDUBA_ASSIGN_OR_RETURN(model.tensors, Safetensors::Open(folder));
  auto weights = ResolveWeights(model.config, *model.tensors);
  if (!weights.ok()) return Annotate(weights.status(), folder);
  model.weights = *std::move(weights);
  return model;
}

}  // namespace eduba
