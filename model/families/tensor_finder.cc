#include "model/families/tensor_finder.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace eduba {

WeightView TensorFinder::Take(const std::string& name, const std::vector<int64_t>& shape) {
  used_.insert(name);
  const auto found = tensors_.tensors().find(name);
  if (found == tensors_.tensors().end()) {
    status_.Update(absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " ", ShapeText(shape),
                     " is missing; do config.json and the weights belong together?")));
    return {};
  }
  const MappedTensor& tensor = found->second;
  const std::optional<DType> dtype = WeightDType(tensor.dtype);
  if (!dtype.has_value()) {
    status_.Update(absl::InvalidArgumentError(absl::StrCat(tensor.file, ": tensor ", name, " is of dtype ",
                                                           tensor.dtype, ", weights are F32, F16 or BF16")));
    return {};
  }
  if (tensor.shape != shape) {
    status_.Update(absl::InvalidArgumentError(absl::StrCat(tensor.file, ": tensor ", name, " has shape ",
                                                           ShapeText(tensor.shape), ", config.json wants ",
                                                           ShapeText(shape))));
    return {};
  }
  return {tensor.data, *dtype, tensor.shape, name};
}

NormWeights TensorFinder::Norm(const std::string& name, int64_t channels, bool bias) {
  NormWeights norm;
  norm.weight = Take(name + ".weight", {channels});
  if (bias) norm.bias = Take(name + ".bias", {channels});
  return norm;
}

LinearWeights TensorFinder::Linear(const std::string& name, int64_t out, int64_t in, bool bias) {
  LinearWeights linear;
  linear.weight = Take(name + ".weight", {out, in});
  if (bias) linear.bias = Take(name + ".bias", {out});
  return linear;
}

WeightView TensorFinder::Head(std::initializer_list<const char*> names, const WeightView& embeddings,
                              const ModelConfig& config) {
  std::string stored;  // The first name that is there; another one is left over for Finish().
  for (const char* name : names) {
    if (stored.empty() && tensors_.tensors().count(name) > 0) stored = name;
  }
  if (!config.tied_embeddings) {
    return Take(stored.empty() ? *names.begin() : stored, {config.vocab_size, config.hidden_size});
  }
  if (stored.empty() || !status_.ok()) return embeddings;
  const WeightView copy = Take(stored, {config.vocab_size, config.hidden_size});
  const int64_t bytes =
      config.vocab_size * config.hidden_size * static_cast<int64_t>(DTypeBytes(embeddings.dtype));
  if (copy.present() && (copy.dtype != embeddings.dtype ||
                         std::memcmp(copy.data, embeddings.data, static_cast<size_t>(bytes)) != 0)) {
    status_.Update(absl::InvalidArgumentError(
        absl::StrCat("tensor ", stored, " is not ", embeddings.name,
                     ", though config.json has tie_word_embeddings; set it to false or remove the tensor")));
  }
  return embeddings;
}

absl::Status TensorFinder::Finish() {
  for (const auto& [name, tensor] : tensors_.tensors()) {
    if (!status_.ok()) break;
    if (used_.count(name) > 0) continue;
    status_ = absl::InvalidArgumentError(absl::StrCat(tensor.file, ": nothing uses tensor ", name,
                                                      "; do config.json and the weights belong together?"));
  }
  return status_;
}

}  // namespace eduba
