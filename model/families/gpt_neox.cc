#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/families/families.h"
#include "model/families/parts.h"

namespace eduba {

using nlohmann::json;

void ParseGptNeoX(JsonFields& fields, ModelConfig& config) {
  ParseSizes(fields, {50432, 6144, 24576, 44, 64, 2048}, config);
  config.kv_heads = config.query_heads;
  if (config.hidden_size % config.query_heads != 0 || config.hidden_size / config.query_heads > kHeadDimMax) {
    fields.Invalid("hidden_size", absl::StrCat("a multiple of num_attention_heads, ", config.query_heads));
    return;
  }
  config.head_dim = static_cast<int>(config.hidden_size / config.query_heads);

  config.norm = NormKind::kLayer;
  config.norm_eps = static_cast<float>(fields.Number("layer_norm_eps", 1e-5, 0, 1));
  config.parallel_residual = fields.Flag("use_parallel_residual", true);
  config.qkv_bias = config.attention_out_bias = fields.Flag("attention_bias", true);
  config.mlp_bias = true;
  config.gated_mlp = false;
  config.activation = ParseActivation(fields, "hidden_act", "gelu");
  config.attention_scale = static_cast<float>(1 / std::sqrt(config.head_dim));
  config.tied_embeddings = fields.Flag("tie_word_embeddings", false);
  fields.Ignore({"hidden_dropout", "classifier_dropout"});

  // transformers 4: rotary_emb_base and rotary_pct, which its later releases also write as rope_theta and
  // partial_rotary_factor. 5: rope_parameters.
  const json& scaling = fields.Get("rope_scaling");
  const json& parameters = fields.Get("rope_parameters");
  if (!scaling.is_null() && !parameters.is_null()) {
    fields.Invalid("rope_scaling", "either rope_scaling or rope_parameters, not both");
  }
  if (!fields.ok()) return;
  const std::string field = scaling.is_null() ? "rope_parameters" : "rope_scaling";
  const double theta = fields.Number("rotary_emb_base", 10000, 1e-9, 1e15);
  const double share = fields.Number("rotary_pct", 0.25, 0, 1);
  const Rope rope = ParseRopeObject(fields, field, fields.Get(field), theta, share, config.head_dim);
  const json& object = fields.Get(field);
  const double used_share = object.is_object() && object.contains("partial_rotary_factor") && fields.ok()
                                ? object["partial_rotary_factor"].get<double>()
                                : share;
  fields.MustEqual("rotary_emb_base", rope.theta, "the rotary theta");
  fields.MustEqual("rope_theta", rope.theta, "the rotary theta");
  fields.MustEqual("rotary_pct", used_share, "the rotary share");
  fields.MustEqual("partial_rotary_factor", used_share, "the rotary share");
  for (LayerConfig& layer : config.layers) layer.rope = rope;
}

void FindGptNeoX(TensorFinder& find, const ModelConfig& config, ModelWeights& weights) {
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;

  weights.embeddings = find.Take("gpt_neox.embed_in.weight", {config.vocab_size, hidden});
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const std::string at = absl::StrCat("gpt_neox.layers.", i, ".");
    LayerWeights& layer = weights.layers[i];
    layer.attention_in = find.Norm(at + "input_layernorm", hidden, true);
    layer.mlp_in = find.Norm(at + "post_attention_layernorm", hidden, true);
    layer.fused_qkv = find.Linear(at + "attention.query_key_value", 3 * hidden, hidden, config.qkv_bias);
    layer.o_proj = find.Linear(at + "attention.dense", hidden, hidden, config.attention_out_bias);
    layer.up = find.Linear(at + "mlp.dense_h_to_4h", inner, hidden, config.mlp_bias);
    layer.down = find.Linear(at + "mlp.dense_4h_to_h", hidden, inner, config.mlp_bias);
    // Buffers that transformers before 4.32 wrote: the causal mask, its value, the rotary frequencies.
    find.Skip(at + "attention.bias");
    find.Skip(at + "attention.masked_bias");
    find.Skip(at + "attention.rotary_emb.inv_freq");
  }
  weights.final_norm = find.Norm("gpt_neox.final_layer_norm", hidden, true);
  weights.head = find.Head({"embed_out.weight", "lm_head.weight"}, weights.embeddings, config);
}

}  // namespace eduba
