#ifndef EDUBA_MODEL_WEIGHTS_H_
#define EDUBA_MODEL_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "model/config.h"
#include "model/safetensors.h"

namespace eduba {

// A weight where it lies in the mapped file: row-major, aligned to its element. Borrowed.
struct WeightView {
  const void* data = nullptr;  // Null: the model has no such weight.
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::string name;  // In the file, for messages.

  bool present() const { return data != nullptr; }
};

// y = W x + b.
struct LinearWeights {
  WeightView weight;  // [out, in]
  WeightView bias;    // [out], or absent
};

struct NormWeights {
  WeightView weight;  // [channels]
  WeightView bias;    // [channels]: present for NormKind::kLayer
};

// One layer, in ModelConfig's words.
struct LayerWeights {
  NormWeights attention_in;   // Norm_in
  NormWeights attention_out;  // Norm_attention_out: post_norms only
  NormWeights mlp_in;         // Norm_mlp_in
  NormWeights mlp_out;        // Norm_mlp_out: post_norms only

  // Either the three of them, q [query_heads * head_dim, hidden], k and v [kv_heads * head_dim, hidden], ...
  LinearWeights q, k, v;
  // ... or all in one map (GPT-NeoX): [query_heads * 3 * head_dim, hidden], whose rows are, head by head,
  // head_dim rows of q, head_dim of k, head_dim of v: row (h * 3 + which) * head_dim + c. Its bias is ordered
  // in the same way.
  LinearWeights fused_qkv;

  NormWeights q_norm, k_norm;  // [head_dim]: qk_norm only. Always NormKind::kRms.
  LinearWeights o_proj;        // [hidden, query_heads * head_dim]
  LinearWeights gate;          // [intermediate, hidden]: gated_mlp only
  LinearWeights up;            // [intermediate, hidden]
  LinearWeights down;          // [hidden, intermediate]
};

struct ModelWeights {
  WeightView embeddings;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  NormWeights final_norm;
  WeightView head;  // [vocab, hidden]; `embeddings` again when they are tied
};

// Finds every tensor that `config` needs. kInvalidArgument: a tensor is missing, has another shape, is of a
// dtype that weights cannot have, or nothing uses it (buffers that old files carry along are known and left
// out); a tied head that is stored as well must hold the embeddings' bytes. The views live as long as
// `tensors`.
absl::StatusOr<ModelWeights> ResolveWeights(const ModelConfig& config, const Safetensors& tensors);

// A model folder, read and checked: config.json and the weights.
struct LoadedModel {
  ModelConfig config;
  std::unique_ptr<Safetensors> tensors;
  ModelWeights weights;  // Into `tensors`.
};
absl::StatusOr<LoadedModel> LoadModel(const std::string& folder);

}  // namespace eduba

#endif  // EDUBA_MODEL_WEIGHTS_H_
