// Any bytes as a config.json: refused, or a model that the transformer can run as far as its numbers go.
#include <cmath>
#include <cstdint>

#include "base/check.h"
#include "model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config = eduba::ParseModelConfig({reinterpret_cast<const char*>(data), size}, "config.json");
  if (!config.ok()) {
    EDUBA_CHECK(config.status().message().find('\n') == absl::string_view::npos);
    return 0;
  }
  EDUBA_CHECK(config->vocab_size > 0 && config->hidden_size > 0 && config->intermediate_size > 0);
  EDUBA_CHECK(config->query_heads > 0 && config->kv_heads > 0 && config->head_dim > 0);
  EDUBA_CHECK_EQ(config->query_heads % config->kv_heads, 0);
  EDUBA_CHECK(!config->layers.empty());
  EDUBA_CHECK(std::isfinite(config->attention_scale) && config->attention_scale > 0);
  EDUBA_CHECK(config->attention_softcap >= 0 && config->logit_softcap >= 0 && config->norm_eps >= 0);
  for (const eduba::LayerConfig& layer : config->layers) EDUBA_CHECK(layer.window >= 0);
  for (const eduba::LayerConfig& layer : {config->layers.front(), config->layers.back()}) {
    EDUBA_CHECK(layer.rope.rotary_dim <= config->head_dim);
    for (const double frequency : InverseFrequencies(layer.rope)) {
      EDUBA_CHECK(std::isfinite(frequency) && frequency >= 0);
    }
  }
  for (const int32_t id : config->eos_tokens) EDUBA_CHECK(id >= 0 && id < config->vocab_size);
  return 0;
}
