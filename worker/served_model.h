#ifndef EDUBA_WORKER_SERVED_MODEL_H_
#define EDUBA_WORKER_SERVED_MODEL_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "eduba/v1/eduba.pb.h"
#include "kernels/layer_kernels.h"
#include "model/tokenizer/tokenizer.h"
#include "model/transformer.h"
#include "model/weights.h"

namespace eduba {

// A model folder, ready to run on one worker: weights packed for its kernels, the tokenizer if there is one,
// and what the world is told about it.
class ServedModel {
 public:
  // Reads every weight once (for the hash) and packs it. `kernels` belongs to the model from now on. Errors
  // as LoadModel and LoadTokenizer; a folder without a tokenizer is fine.
  static absl::StatusOr<std::unique_ptr<ServedModel>> Load(const std::string& folder,
                                                           std::unique_ptr<LayerKernels> kernels);

  const v1::Model& info() const { return info_; }
  Transformer& transformer() { return *transformer_; }
  DType kv_dtype() const { return transformer_->weight_dtype(); }
  // Null: the folder has none.
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }

 private:
  ServedModel() = default;

  std::unique_ptr<LayerKernels> kernels_;
  LoadedModel loaded_;
  std::unique_ptr<Transformer> transformer_;
  std::unique_ptr<Tokenizer> tokenizer_;
  v1::Model info_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_SERVED_MODEL_H_
