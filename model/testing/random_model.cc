#include "model/testing/random_model.h"

#include <cmath>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace eduba::testing {

ModelConfig RandomModel::RandomConfig(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[random() % sizeof...(options)];
  };
  ModelConfig config;
  config.vocab_size = pick(11, 40, 97);
  config.hidden_size = pick(8, 24, 33);
  config.intermediate_size = pick(8, 31, 64);
  config.kv_heads = pick(1, 2, 3);
  config.query_heads = config.kv_heads * pick(1, 2, 4);
  config.head_dim = pick(4, 8, 20);
  config.trained_positions = pick(64, 4096);
  config.norm = pick(NormKind::kRms, NormKind::kRms, NormKind::kLayer);
  config.norm_eps = pick(1e-5F, 1e-6F);
  config.norm_plus_one = config.norm == NormKind::kRms && pick(false, true);
  config.post_norms = config.norm == NormKind::kRms && pick(false, true);
  config.parallel_residual = !config.post_norms && pick(false, true);
  config.qk_norm = pick(false, true);
  config.qkv_bias = pick(false, true);
  config.attention_out_bias = pick(false, true);
  config.mlp_bias = pick(false, true);
  config.activation = pick(Activation::kSilu, Activation::kGeluTanh, Activation::kGeluErf);
  config.gated_mlp = pick(false, true);
  config.attention_scale = 1 / std::sqrt(static_cast<float>(config.head_dim));
  config.attention_softcap = pick(0.0F, 0.0F, 5.0F);
  config.logit_softcap = pick(0.0F, 0.0F, 30.0F);
  config.embedding_scale = pick(1.0F, 4.0F);
  config.layers.resize(pick(1, 2, 3));
  for (LayerConfig& layer : config.layers) {
    layer.window = pick(0, 0, 5, 40);
    layer.rope.theta = pick(100.0, 10000.0);
    layer.rope.rotary_dim = pick(2, 4, config.head_dim);
  }
  return config;
}

RandomModel::RandomModel(uint64_t seed)
    : RandomModel(RandomConfig(seed),
                  seed % 3 == 0   ? DType::kBf16
                  : seed % 3 == 1 ? DType::kF32
                                  : DType::kF16,
                  seed) {}

RandomModel::RandomModel(const ModelConfig& model_config, DType weight_dtype, uint64_t seed)
    : config(model_config), dtype(weight_dtype), seed_(seed), random_(seed) {
  const int64_t width = config.hidden_size;
  const int64_t queries = int64_t{config.query_heads} * config.head_dim;
  const int64_t keys = int64_t{config.kv_heads} * config.head_dim;
  const bool layer_norm = config.norm == NormKind::kLayer;
  weights.embeddings = Tensor({config.vocab_size, width}, 0, 1);
  for (size_t i = 0; i < config.layers.size(); ++i) {
    LayerWeights layer;
    layer.attention_in = Norm(width, layer_norm);
    layer.mlp_in = Norm(width, layer_norm);
    if (config.post_norms) {
      layer.attention_out = Norm(width, false);
      layer.mlp_out = Norm(width, false);
    }
    layer.q = Linear(queries, width, config.qkv_bias);
    layer.k = Linear(keys, width, config.qkv_bias);
    layer.v = Linear(keys, width, config.qkv_bias);
    if (config.qk_norm) {
      layer.q_norm = Norm(config.head_dim, false);
      layer.k_norm = Norm(config.head_dim, false);
    }
    layer.o_proj = Linear(width, queries, config.attention_out_bias);
    if (config.gated_mlp) layer.gate = Linear(config.intermediate_size, width, config.mlp_bias);
    layer.up = Linear(config.intermediate_size, width, config.mlp_bias);
    layer.down = Linear(width, config.intermediate_size, config.mlp_bias);
    weights.layers.push_back(layer);
  }
  weights.final_norm = Norm(width, layer_norm);
  weights.head = Tensor({config.vocab_size, width}, 0, 1);
}

std::string RandomModel::ToString() const {
  return absl::StrCat("{seed=", seed_, " dtype=", DTypeName(dtype), " layers=", config.layers.size(),
                      " hidden=", config.hidden_size, " heads=", config.query_heads, "/", config.kv_heads,
                      " head_dim=", config.head_dim, "}");
}

WeightView RandomModel::Tensor(std::vector<int64_t> shape, float center, float size) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  std::vector<char>& bytes = memory_.emplace_back(count * DTypeBytes(dtype));
  std::normal_distribution<float> normal(center, size);
  for (int64_t i = 0; i < count; ++i) StoreElement(bytes.data(), dtype, i, normal(random_));
  return {bytes.data(), dtype, std::move(shape), "random"};
}

NormWeights RandomModel::Norm(int64_t channels, bool bias) {
  NormWeights norm;
  norm.weight = Tensor({channels}, config.norm_plus_one ? 0.0F : 1.0F, 0.3F);
  if (bias) norm.bias = Tensor({channels}, 0, 0.3F);
  return norm;
}

LinearWeights RandomModel::Linear(int64_t out, int64_t in, bool bias) {
  LinearWeights linear;
  linear.weight = Tensor({out, in}, 0, 1.5F / std::sqrt(static_cast<float>(in)));
  if (bias) linear.bias = Tensor({out}, 0, 0.3F);
  return linear;
}

}  // namespace eduba::testing
