#include "model/families/parts.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "model/json.h"

namespace eduba {

using nlohmann::json;

void ParseSizes(JsonFields& fields, const SizeDefaults& defaults, ModelConfig& config) {
  config.vocab_size = fields.Size("vocab_size", defaults.vocab, kVocabMax);
  config.hidden_size = fields.Size("hidden_size", defaults.hidden, kChannelsMax);
  config.intermediate_size = fields.Size("intermediate_size", defaults.intermediate, kChannelsMax);
  config.layers.resize(static_cast<size_t>(fields.Size("num_hidden_layers", defaults.layers, kLayersMax)));
  config.query_heads = static_cast<int>(fields.Size("num_attention_heads", defaults.heads, kHeadsMax));
  config.trained_positions = fields.Size("max_position_embeddings", defaults.positions, kPositionsMax);
}

void ParseKvHeads(JsonFields& fields, std::optional<int64_t> fallback, ModelConfig& config) {
  const bool absent = !fields.Has("num_key_value_heads");
  config.kv_heads = static_cast<int>(fields.Size(
      "num_key_value_heads", absent ? fallback.value_or(config.query_heads) : config.query_heads, kHeadsMax));
  if (config.query_heads % config.kv_heads != 0) {
    fields.Invalid("num_key_value_heads",
                   absl::StrCat("a divisor of num_attention_heads, ", config.query_heads));
  }
}

void ParseHeadDim(JsonFields& fields, std::optional<int64_t> fallback, ModelConfig& config) {
  // Where the default is a number, transformers does not know null.
  if (fallback.has_value() && fields.Has("head_dim") && fields.Get("head_dim").is_null()) {
    fields.Invalid("head_dim", "a whole number");
  }
  const int64_t head_dim = fields.Size("head_dim", fallback.value_or(0), kHeadDimMax);
  if (head_dim > 0) {
    config.head_dim = static_cast<int>(head_dim);
    return;
  }
  if (config.hidden_size % config.query_heads != 0 || config.hidden_size / config.query_heads > kHeadDimMax) {
    fields.Invalid("hidden_size", absl::StrCat("a multiple of num_attention_heads, ", config.query_heads));
    return;
  }
  config.head_dim = static_cast<int>(config.hidden_size / config.query_heads);
}

Activation ParseActivation(JsonFields& fields, const std::string& field, const std::string& fallback) {
  const std::string name = fields.Text(field, fallback);
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu" || name == "gelu_python") return Activation::kGeluErf;
  // Four spellings of one formula; they round differently in the last digit.
  if (name == "gelu_pytorch_tanh" || name == "gelu_python_tanh" || name == "gelu_new" ||
      name == "gelu_fast") {
    return Activation::kGeluTanh;
  }
  fields.Refuse(field, "known are silu, gelu, gelu_pytorch_tanh, gelu_new and gelu_fast");
  return Activation::kSilu;
}

Rope ParseRopeObject(JsonFields& fields, const std::string& field, const json& object, double theta,
                     double default_rotary_share, int head_dim) {
  constexpr double kTiny = 1e-9;
  constexpr double kHuge = 1e15;
  Rope rope;
  static const json kEmpty = json::object();
  if (!object.is_null() && !object.is_object()) {
    fields.Invalid(field, "an object");
    return rope;
  }
  JsonFields inner(object.is_null() ? kEmpty : object, absl::StrCat(fields.name(), ": ", field),
                   fields.what());
  const std::string type = inner.Text("rope_type", inner.Text("type", "default"));
  // transformers 4 believes the one, 5 the other.
  if (inner.Text("type", type) != type) inner.Invalid("type", "the same as rope_type");
  rope.theta = inner.Number("rope_theta", theta, kTiny, kHuge);
  const double share = inner.Number("partial_rotary_factor", default_rotary_share, 0, 1);
  rope.rotary_dim = static_cast<int>(head_dim * share);
  if (rope.rotary_dim < 2 || rope.rotary_dim % 2 != 0) {
    fields.Fail(absl::InvalidArgumentError(absl::StrCat(fields.name(), ": rotary embedding over ",
                                                        rope.rotary_dim, " of ", head_dim,
                                                        " channels of a head, wanted an even number")));
  }
  if (type == "default") {
    rope.kind = Rope::Kind::kDefault;
  } else if (type == "linear") {
    rope.kind = Rope::Kind::kLinear;
    rope.factor = inner.Number("factor", std::nullopt, kTiny, kHuge);
  } else if (type == "llama3") {
    rope.kind = Rope::Kind::kLlama3;
    rope.factor = inner.Number("factor", std::nullopt, kTiny, kHuge);
    rope.low_freq_factor = inner.Number("low_freq_factor", std::nullopt, kTiny, kHuge);
    rope.high_freq_factor = inner.Number("high_freq_factor", std::nullopt, kTiny, kHuge);
    rope.original_positions = inner.Size("original_max_position_embeddings", std::nullopt, kPositionsMax);
    if (inner.ok() && rope.high_freq_factor <= rope.low_freq_factor) {
      inner.Invalid("high_freq_factor", absl::StrCat("more than low_freq_factor, ", rope.low_freq_factor));
    }
  } else {
    inner.Refuse(inner.Has("rope_type") ? "rope_type" : "type", "known are default, linear and llama3");
  }
  fields.Fail(inner.Finish());
  return rope;
}

Rope ParseRope(JsonFields& fields, double default_theta, int head_dim) {
  const json& scaling = fields.Get("rope_scaling");
  const json& parameters = fields.Get("rope_parameters");
  if (!scaling.is_null() && !parameters.is_null()) {
    fields.Invalid("rope_scaling", "either rope_scaling or rope_parameters, not both");
  }
  const std::string field = scaling.is_null() ? "rope_parameters" : "rope_scaling";
  const double theta = fields.Number("rope_theta", default_theta, 1e-9, 1e15);
  const Rope rope =
      ParseRopeObject(fields, field, fields.Get(field), theta, /*default_rotary_share=*/1, head_dim);
  fields.MustEqual("rope_theta", rope.theta, absl::StrCat(field, ".rope_theta"));
  // Where the families differ between releases of transformers: some turn a share of the channels, some
  // ignore the field.
  if (rope.rotary_dim != head_dim) fields.Refuse(field, "a partial_rotary_factor other than 1");
  fields.MustEqual("partial_rotary_factor", 1, "the rotary share of this family");
  return rope;
}

std::vector<bool> ParseLayerTypes(JsonFields& fields, const ModelConfig& config) {
  const json& types = fields.Get("layer_types");
  if (types.is_null()) return {};
  if (!types.is_array() || types.size() != config.layers.size()) {
    fields.Invalid("layer_types", absl::StrCat("a list of ", config.layers.size(), " types, one a layer"));
    return {};
  }
  std::vector<bool> slides;
  for (const json& type : types) {
    if (type != "sliding_attention" && type != "full_attention") {
      fields.Fail(absl::UnimplementedError(absl::StrCat(fields.name(), ": layer_types has ", JsonText(type),
                                                        ", known are sliding_attention and full_attention")));
      return {};
    }
    slides.push_back(type == "sliding_attention");
  }
  return slides;
}

void SetWindows(JsonFields& fields, const std::vector<bool>& slides, std::optional<int64_t> window,
                ModelConfig& config) {
  if (!fields.ok()) return;
  for (size_t i = 0; i < slides.size(); ++i) {
    if (!slides[i]) continue;
    if (!window.has_value()) {
      fields.Invalid("sliding_window",
                     absl::StrCat("a number of positions: layer ", i, " is sliding_attention"));
      return;
    }
    config.layers[i].window = *window;
  }
}

}  // namespace eduba
