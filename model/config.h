#ifndef EDUBA_MODEL_CONFIG_H_
#define EDUBA_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/dtype.h"
#include "kernels/activation.h"
#include "kernels/norm.h"
#include "model/rope.h"

namespace eduba {

// Which code in Hugging Face transformers defines the model. Only the parser and the tensors' names depend on
// it (model/families): whatever changes the arithmetic is a field of ModelConfig.
enum class ModelFamily : uint8_t { kLlama, kMistral, kQwen2, kQwen3, kGptNeoX, kGemma2, kGemma3 };

// "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3_text": config.json's model_type.
const char* ModelFamilyName(ModelFamily family);

// What differs from layer to layer.
struct LayerConfig {
  // > 0: a query at position i sees keys j with i - window < j <= i, itself included. 0: all j <= i.
  int64_t window = 0;
  Rope rope;
  bool operator==(const LayerConfig&) const = default;
};

// A decoder-only transformer, described so that one implementation runs every family. For token t at position
// i:
//   x = embedding_scale * E[t]
//   every layer:  a = Attention(Norm_in(x));  if (post_norms) a = Norm_attention_out(a)
//     parallel_residual:  x = x + a + Mlp(Norm_mlp_in(x))          (both read the x from before)
//     else:               x = x + a;  m = Mlp(Norm_mlp_in(x));  if (post_norms) m = Norm_mlp_out(m);  x = x +
//     m
//   logits = H Norm_final(x),  H = E if tied_embeddings;  if (logit_softcap) logits = c * tanh(logits / c)
// Attention: q, k, v by linear maps of Norm_in(x); if (qk_norm) q and k of every head get an RMS norm of
// their own over head_dim (weight shared by the heads); rotary; softmax(attention_scale * q.k), softcapped
// before the softmax as kernels/backend.h says; query head h reads KV head h / (query_heads / kv_heads). Mlp:
// gated_mlp: W_down(act(W_gate x) * W_up x); else W_down act(W_up x).
struct ModelConfig {
  ModelFamily family = ModelFamily::kLlama;

  int64_t vocab_size = 0;  // Rows of E: token ids are in [0, vocab_size).
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;  // The width of queries, keys and values. query_heads * head_dim need not be hidden_size.
  std::vector<LayerConfig> layers;  // Never empty.
  int64_t trained_positions =
      0;  // max_position_embeddings: what the model was trained for. Informs, limits nothing.

  NormKind norm = NormKind::kRms;
  float norm_eps = 0;
  bool norm_plus_one = false;  // Gemma: every RMS norm, QK norms too, multiplies by (1 + w) and rounds last.
  bool post_norms = false;
  bool qk_norm = false;
  bool parallel_residual = false;

  bool qkv_bias = false;
  bool attention_out_bias = false;
  bool mlp_bias = false;  // On all of the MLP's maps. (NormKind::kLayer always has a bias, kRms never.)

  Activation activation = Activation::kSilu;
  bool gated_mlp = true;

  float attention_scale = 0;
  float attention_softcap = 0;  // 0: none.
  float logit_softcap = 0;      // 0: none.
  bool tied_embeddings = false;

  // sqrt(hidden_size) for Gemma, else 1, as an f32. transformers rounds it to the type it computes in:
  // RoundedEmbeddingScale.
  float embedding_scale = 1;

  std::optional<int32_t> bos_token;
  std::vector<int32_t> eos_tokens;  // Generation ends at any of them. May be empty.

  bool operator==(const ModelConfig&) const = default;
};

// embedding_scale rounded to `dtype`: equal to transformers' factor when it runs the model in `dtype`. (A
// Gemma in bf16 was trained with the bf16 value, 55.5 for a hidden size of 3072, and differs in the third
// digit from the f32 one.)
float RoundedEmbeddingScale(const ModelConfig& config, DType dtype);

// Longest config.json that is read, in bytes.
inline constexpr int64_t kModelConfigBytesMax = int64_t{1} << 20;

// Reads the text of a Hugging Face config.json, old and new spellings, with transformers' defaults for fields
// that are left out (docs/models.md). `name` begins the messages. kUnimplemented: an architecture, or a field
// that would change the result, that Eduba does not implement: named, never ignored. kInvalidArgument: no
// such JSON, fields missing, of wrong types, out of range, or at odds with each other.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, const std::string& name);

// `folder`/config.json, and the tokens that end a generation from generation_config.json, if it is there and
// names any (instruction-tuned models list more in it); its other fields are a request's business. kNotFound:
// no config.json.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder);

}  // namespace eduba

#endif  // EDUBA_MODEL_CONFIG_H_
