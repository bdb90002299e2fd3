#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/families/families.h"
#include "model/families/parts.h"

namespace eduba {
namespace {

struct LlamaLike {
  SizeDefaults sizes;
  std::optional<int64_t> kv_heads;  // nullopt: as many as query heads.
  std::optional<int64_t> head_dim;  // nullopt: hidden size / heads.
};

LlamaLike DefaultsOf(ModelFamily family) {
  switch (family) {
    case ModelFamily::kMistral:
      return {{32000, 4096, 14336, 32, 32, 131072}, 8, std::nullopt};
    case ModelFamily::kQwen2:
      return {{151936, 4096, 22016, 32, 32, 32768}, 32, std::nullopt};
    case ModelFamily::kQwen3:
      return {{151936, 4096, 22016, 32, 32, 32768}, 32, 128};
    default:
      return {{32000, 4096, 11008, 32, 32, 2048}, std::nullopt, std::nullopt};
  }
}

// Which layers slide, and over how many positions.
void ParseWindows(JsonFields& fields, ModelConfig& config) {
  const bool qwen = config.family == ModelFamily::kQwen2 || config.family == ModelFamily::kQwen3;
  // Knows none: a window given to it is refused as unknown.
  if (config.family == ModelFamily::kLlama) return;
  // Absent: 4096. Null: none.
  std::optional<int64_t> window;
  if (!fields.Has("sliding_window")) {
    window = 4096;
  } else if (!fields.Get("sliding_window").is_null()) {
    window = fields.Size("sliding_window", std::nullopt, kPositionsMax);
  }
  std::vector<bool> slides(config.layers.size(), window.has_value());
  if (qwen) {
    fields.Get("sliding_window");
    if (!fields.Flag("use_sliding_window", false)) window.reset();
    // 0 is a number like others here: every layer slides.
    const int64_t full = static_cast<int64_t>(fields.Number("max_window_layers", 28, 0, kLayersMax));
    for (size_t i = 0; i < slides.size(); ++i) {
      slides[i] = window.has_value() && static_cast<int64_t>(i) >= full;
    }
  }
  const std::vector<bool> types = ParseLayerTypes(fields, config);
  if (!types.empty() && qwen) slides = types;
  // transformers' Mistral ignores layer_types.
  if (!types.empty() && types != slides) fields.Refuse("layer_types", "all its layers use sliding_window");
  SetWindows(fields, slides, window, config);
}

}  // namespace

void ParseLlama(JsonFields& fields, ModelConfig& config) {
  const LlamaLike defaults = DefaultsOf(config.family);
  ParseSizes(fields, defaults.sizes, config);
  ParseKvHeads(fields, defaults.kv_heads, config);
  ParseHeadDim(fields, defaults.head_dim, config);

  config.norm = NormKind::kRms;
  config.norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 1e-6, 0, 1));
  config.qk_norm = config.family == ModelFamily::kQwen3;
  config.activation = ParseActivation(fields, "hidden_act", "silu");
  config.attention_scale = static_cast<float>(1 / std::sqrt(config.head_dim));
  config.tied_embeddings = fields.Flag("tie_word_embeddings", false);

  switch (config.family) {
    case ModelFamily::kLlama:
      config.qkv_bias = config.attention_out_bias = fields.Flag("attention_bias", false);
      config.mlp_bias = fields.Flag("mlp_bias", false);
      break;
    case ModelFamily::kQwen3:
      config.qkv_bias = config.attention_out_bias = fields.Flag("attention_bias", false);
      fields.RefuseUnlessOff({"mlp_bias"});
      break;
    case ModelFamily::kQwen2:
      // Always; the field that some files carry is not read by transformers.
      config.qkv_bias = true;
      if (!fields.Flag("attention_bias", true)) {
        fields.Refuse("attention_bias", "Qwen2 has biases on q, k and v");
      }
      fields.RefuseUnlessOff({"mlp_bias"});
      break;
    default:
      fields.RefuseUnlessOff({"attention_bias", "mlp_bias"});
      break;
  }

  if (!fields.ok()) return;
  const Rope rope = ParseRope(fields, /*default_theta=*/10000, config.head_dim);
  for (LayerConfig& layer : config.layers) layer.rope = rope;
  ParseWindows(fields, config);
}

void FindLlama(TensorFinder& find, const ModelConfig& config, ModelWeights& weights) {
  const int64_t hidden = config.hidden_size;
  const int64_t queries = int64_t{config.query_heads} * config.head_dim;
  const int64_t keys = int64_t{config.kv_heads} * config.head_dim;
  const int64_t inner = config.intermediate_size;

  weights.embeddings = find.Take("model.embed_tokens.weight", {config.vocab_size, hidden});
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const std::string at = absl::StrCat("model.layers.", i, ".");
    LayerWeights& layer = weights.layers[i];
    layer.attention_in = find.Norm(at + "input_layernorm", hidden, false);
    if (config.post_norms) {
      layer.attention_out = find.Norm(at + "post_attention_layernorm", hidden, false);
      layer.mlp_in = find.Norm(at + "pre_feedforward_layernorm", hidden, false);
      layer.mlp_out = find.Norm(at + "post_feedforward_layernorm", hidden, false);
    } else {
      layer.mlp_in = find.Norm(at + "post_attention_layernorm", hidden, false);
    }
    layer.q = find.Linear(at + "self_attn.q_proj", queries, hidden, config.qkv_bias);
    layer.k = find.Linear(at + "self_attn.k_proj", keys, hidden, config.qkv_bias);
    layer.v = find.Linear(at + "self_attn.v_proj", keys, hidden, config.qkv_bias);
    if (config.qk_norm) {
      layer.q_norm = find.Norm(at + "self_attn.q_norm", config.head_dim, false);
      layer.k_norm = find.Norm(at + "self_attn.k_norm", config.head_dim, false);
    }
    layer.o_proj = find.Linear(at + "self_attn.o_proj", hidden, queries, config.attention_out_bias);
    layer.gate = find.Linear(at + "mlp.gate_proj", inner, hidden, config.mlp_bias);
    layer.up = find.Linear(at + "mlp.up_proj", inner, hidden, config.mlp_bias);
    layer.down = find.Linear(at + "mlp.down_proj", hidden, inner, config.mlp_bias);
    find.Skip(at + "self_attn.rotary_emb.inv_freq");  // A buffer that transformers before 4.32 wrote.
  }
  weights.final_norm = find.Norm("model.norm", hidden, false);
  weights.head = find.Head({"lm_head.weight"}, weights.embeddings, config);
}

}  // namespace eduba
