#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/families/families.h"
#include "model/families/parts.h"

namespace eduba {
namespace {

using nlohmann::json;

// Every so manieth layer is global, the others slide.
std::vector<bool> Pattern(size_t layers, int64_t every) {
  std::vector<bool> slides(layers);
  for (size_t i = 0; i < layers; ++i) slides[i] = (static_cast<int64_t>(i) + 1) % every != 0;
  return slides;
}

void ParseWindows(JsonFields& fields, ModelConfig& config) {
  const bool gemma3 = config.family == ModelFamily::kGemma3;
  std::optional<int64_t> window;
  if (!fields.Has("sliding_window")) {
    window = 4096;
  } else if (!fields.Get("sliding_window").is_null()) {
    window = fields.Size("sliding_window", std::nullopt, kPositionsMax);
  }
  // Gemma-2's first files say it twice.
  if (window.has_value()) {
    fields.MustEqual("sliding_window_size", static_cast<double>(*window), "sliding_window");
  }

  // Gemma-2 has no such field; Gemma-3's is read under the first name, and written under the second as well.
  const int64_t every = gemma3 ? fields.Size("sliding_window_pattern", 6, kLayersMax) : 2;
  std::vector<bool> slides = ParseLayerTypes(fields, config);
  if (slides.empty()) {
    slides = Pattern(config.layers.size(), every);
    fields.MustEqual("sliding_window_pattern", static_cast<double>(every), "the pattern of this family");
    fields.MustEqual("_sliding_window_pattern", static_cast<double>(every), "sliding_window_pattern");
  } else {
    fields.Ignore({"sliding_window_pattern", "_sliding_window_pattern"});  // layer_types overrules them.
  }
  SetWindows(fields, slides, window, config);
}

// Gemma-3 has two rotary embeddings. transformers 4: rope_theta and rope_scaling for global layers,
// rope_local_base_freq for sliding ones. 5: rope_parameters {full_attention, sliding_attention}.
void ParseTwoRopes(JsonFields& fields, ModelConfig& config) {
  const json& scaling = fields.Get("rope_scaling");
  const json& parameters = fields.Get("rope_parameters");
  const double global_theta = fields.Number("rope_theta", 1e6, 1e-9, 1e15);
  const double local_theta = fields.Number("rope_local_base_freq", 1e4, 1e-9, 1e15);
  Rope global;
  Rope local;
  if (parameters.is_null()) {
    global = ParseRopeObject(fields, "rope_scaling", scaling, global_theta, 1, config.head_dim);
    local = ParseRopeObject(fields, "rope_local_base_freq", json(), local_theta, 1, config.head_dim);
  } else if (!parameters.is_object()) {
    fields.Invalid("rope_parameters", "an object");
    return;
  } else {
    if (!scaling.is_null()) {
      fields.Invalid("rope_scaling", "either rope_scaling or rope_parameters, not both");
    }
    JsonFields inner(parameters, absl::StrCat(fields.name(), ": rope_parameters"), fields.what());
    global = ParseRopeObject(inner, "full_attention", inner.Get("full_attention"), global_theta, 1,
                             config.head_dim);
    local = ParseRopeObject(inner, "sliding_attention", inner.Get("sliding_attention"), local_theta, 1,
                            config.head_dim);
    fields.Fail(inner.Finish());
  }
  fields.MustEqual("rope_theta", global.theta, "the global layers' theta");
  fields.MustEqual("rope_local_base_freq", local.theta, "the sliding layers' theta");
  fields.MustEqual("partial_rotary_factor", 1, "the rotary share of this family");
  if (fields.ok() && (global.rotary_dim != config.head_dim || local.rotary_dim != config.head_dim)) {
    fields.Refuse("rope_parameters", "a partial_rotary_factor other than 1");
  }
  for (LayerConfig& layer : config.layers) layer.rope = layer.window > 0 ? local : global;
}

}  // namespace

void ParseGemma(JsonFields& fields, ModelConfig& config) {
  const bool gemma3 = config.family == ModelFamily::kGemma3;
  ParseSizes(fields,
             gemma3 ? SizeDefaults{262208, 2304, 9216, 26, 8, 131072}
                    : SizeDefaults{256000, 2304, 9216, 26, 8, 8192},
             config);
  ParseKvHeads(fields, 4, config);
  ParseHeadDim(fields, 256, config);

  config.norm = NormKind::kRms;
  config.norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 1e-6, 0, 1));
  config.norm_plus_one = true;
  config.post_norms = true;
  config.qk_norm = gemma3;
  config.qkv_bias = config.attention_out_bias = fields.Flag("attention_bias", false);
  config.activation = ParseActivation(fields, "hidden_activation", "gelu_pytorch_tanh");
  // A field of Gemma-1 that Gemma-2's files still carry; transformers does not read it.
  if (ParseActivation(fields, "hidden_act", fields.Text("hidden_activation", "gelu_pytorch_tanh")) !=
      config.activation) {
    fields.Invalid("hidden_act", "the same as hidden_activation");
  }
  config.attention_scale =
      static_cast<float>(1 / std::sqrt(fields.Number("query_pre_attn_scalar", 256, 1e-9, kChannelsMax)));
  config.tied_embeddings = fields.Flag("tie_word_embeddings", true);
  config.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(config.hidden_size)));

  // Absent: 30 and 50 for Gemma-2, none for Gemma-3. Null: none.
  const auto softcap = [&](const char* field, double fallback) {
    if (!fields.Has(field)) return gemma3 ? 0.0f : static_cast<float>(fallback);
    return static_cast<float>(fields.OptionalNumber(field, 1e-6, 1e6).value_or(0));
  };
  config.logit_softcap = softcap("final_logit_softcapping", 30);
  config.attention_softcap = softcap("attn_logit_softcapping", 50);
  if (gemma3 && config.attention_softcap > 0) {
    fields.Refuse("attn_logit_softcapping",
                  "transformers reads it and does not apply it, so its meaning is open");
  }

  if (!fields.ok()) return;
  ParseWindows(fields, config);
  if (gemma3) {
    ParseTwoRopes(fields, config);
  } else {
    const Rope rope = ParseRope(fields, /*default_theta=*/10000, config.head_dim);
    for (LayerConfig& layer : config.layers) layer.rope = rope;
  }
}

}  // namespace eduba
