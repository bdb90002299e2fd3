#include "model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/testing/safetensors_writer.h"

namespace eduba {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What the Hub's files of well-known models say (facts, typed in by hand).
json Llama32() {
  return json::parse(
      R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
    "use_cache": true, "vocab_size": 128256})");
}

json Pythia1b() {
  return json::parse(R"({"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
    "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true,
    "vocab_size": 50304})");
}

json Gemma2With27b() {
  return json::parse(
      R"({"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
    "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 256000,
    "_attn_implementation": "eager"})");
}

json Gemma3With270m() {
  return json::parse(R"({"_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2,
    "eos_token_id": 1, "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": 512,
    "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": false,
    "use_cache": true, "vocab_size": 262144})");
}

json Qwen2() {
  return json::parse(
      R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
    "vocab_size": 151936})");
}

json Qwen3() {
  return json::parse(
      R"({"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
    "use_sliding_window": false, "vocab_size": 151936})");
}

json Mistral() {
  return json::parse(R"({"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true,
    "vocab_size": 32000})");
}

std::vector<json> All() {
  return {Llama32(), Pythia1b(), Gemma2With27b(), Gemma3With270m(), Qwen2(), Qwen3(), Mistral()};
}

ModelConfig Parse(const json& config) {
  const auto parsed = ParseModelConfig(config.dump(), "config.json");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *parsed : ModelConfig{};
}

std::string ErrorOf(const json& config) {
  const auto parsed = ParseModelConfig(config.dump(), "config.json");
  if (parsed.ok()) return "OK";
  EXPECT_FALSE(absl::StrContains(parsed.status().ToString(), '\n')) << parsed.status();
  return parsed.status().ToString();
}

json With(json config, const std::string& field, const json& value) {
  config[field] = value;
  return config;
}
json Without(json config, const std::string& field) {
  config.erase(field);
  return config;
}

TEST(Config, LlamaHasGroupedQueriesAndScaledRotary) {
  const ModelConfig config = Parse(Llama32());
  EXPECT_EQ(config.family, ModelFamily::kLlama);
  EXPECT_EQ(config.vocab_size, 128256);
  EXPECT_EQ(config.hidden_size, 2048);
  EXPECT_EQ(config.intermediate_size, 8192);
  EXPECT_EQ(config.query_heads, 32);
  EXPECT_EQ(config.kv_heads, 8);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.trained_positions, 131072);
  EXPECT_EQ(config.norm, NormKind::kRms);
  EXPECT_EQ(config.norm_eps, 1e-5f);
  EXPECT_FALSE(config.norm_plus_one || config.post_norms || config.qk_norm || config.parallel_residual);
  EXPECT_FALSE(config.qkv_bias || config.attention_out_bias || config.mlp_bias);
  EXPECT_EQ(config.activation, Activation::kSilu);
  EXPECT_TRUE(config.gated_mlp && config.tied_embeddings);
  EXPECT_EQ(config.attention_scale, 0.125f);
  EXPECT_EQ(config.attention_softcap, 0);
  EXPECT_EQ(config.logit_softcap, 0);
  EXPECT_EQ(config.embedding_scale, 1);
  EXPECT_EQ(config.bos_token, 128000);
  EXPECT_THAT(config.eos_tokens, ElementsAre(128001, 128008, 128009));
  ASSERT_EQ(config.layers.size(), 16u);
  const Rope rope{Rope::Kind::kLlama3, 500000, 64, 32, 1, 4, 8192};
  for (const LayerConfig& layer : config.layers) EXPECT_EQ(layer, (LayerConfig{0, rope}));
}

TEST(Config, LlamaBiasesAreReadOneByOne) {
  const ModelConfig attention = Parse(With(Llama32(), "attention_bias", true));
  EXPECT_TRUE(attention.qkv_bias && attention.attention_out_bias && !attention.mlp_bias);
  const ModelConfig mlp = Parse(With(Llama32(), "mlp_bias", true));
  EXPECT_TRUE(!mlp.qkv_bias && !mlp.attention_out_bias && mlp.mlp_bias);
}

TEST(Config, NeoXHasParallelResidualBiasesAndAQuarterOfRotary) {
  const ModelConfig config = Parse(Pythia1b());
  EXPECT_EQ(config.head_dim, 256);
  EXPECT_EQ(config.kv_heads, 8);
  EXPECT_EQ(config.norm, NormKind::kLayer);
  EXPECT_TRUE(config.parallel_residual && config.qkv_bias && config.attention_out_bias && config.mlp_bias);
  EXPECT_FALSE(config.gated_mlp || config.tied_embeddings);
  EXPECT_EQ(config.activation, Activation::kGeluErf);
  EXPECT_EQ(config.attention_scale, 0.0625f);
  EXPECT_EQ(config.layers[3], (LayerConfig{0, Rope{Rope::Kind::kDefault, 10000, 64}}));
  EXPECT_FALSE(Parse(With(Pythia1b(), "use_parallel_residual", false)).parallel_residual);
  const ModelConfig bare = Parse(With(Pythia1b(), "attention_bias", false));
  EXPECT_TRUE(!bare.qkv_bias && !bare.attention_out_bias && bare.mlp_bias);
}

TEST(Config, Gemma2AlternatesWindowsAndCapsLogits) {
  const ModelConfig config = Parse(Gemma2With27b());
  EXPECT_TRUE(config.norm_plus_one && config.post_norms && config.gated_mlp && config.tied_embeddings);
  EXPECT_FALSE(config.qk_norm);
  EXPECT_EQ(config.activation, Activation::kGeluTanh);
  EXPECT_EQ(config.attention_softcap, 50);
  EXPECT_EQ(config.logit_softcap, 30);
  EXPECT_EQ(config.attention_scale, static_cast<float>(1 / 12.0));
  EXPECT_EQ(config.embedding_scale, std::sqrt(4608.0f));
  ASSERT_EQ(config.layers.size(), 46u);
  for (size_t i = 0; i < config.layers.size(); ++i) {
    EXPECT_EQ(config.layers[i], (LayerConfig{i % 2 == 0 ? 4096 : 0, Rope{Rope::Kind::kDefault, 10000, 128}}))
        << i;
  }
}

TEST(Config, Gemma3HasFiveLocalLayersToOneGlobalWithTwoRotaryBases) {
  const ModelConfig config = Parse(Gemma3With270m());
  EXPECT_TRUE(config.norm_plus_one && config.post_norms && config.qk_norm && config.tied_embeddings);
  EXPECT_EQ(config.attention_softcap, 0);
  EXPECT_EQ(config.logit_softcap, 0);
  for (size_t i = 0; i < config.layers.size(); ++i) {
    const bool global = i == 5 || i == 11 || i == 17;
    EXPECT_EQ(config.layers[i],
              (LayerConfig{global ? 0 : 512, Rope{Rope::Kind::kDefault, global ? 1e6 : 1e4, 256}}))
        << i;
  }
}

TEST(Config, Gemma3ScalesOnlyGlobalLayers) {
  const ModelConfig config =
      Parse(With(Gemma3With270m(), "rope_scaling", {{"rope_type", "linear"}, {"factor", 8.0}}));
  EXPECT_EQ(config.layers[0].rope, (Rope{Rope::Kind::kDefault, 1e4, 256}));
  EXPECT_EQ(config.layers[5].rope, (Rope{Rope::Kind::kLinear, 1e6, 256, 8}));
}

TEST(Config, QwensDifferInBiasesAndQkNorms) {
  const ModelConfig qwen2 = Parse(Qwen2());
  EXPECT_TRUE(qwen2.qkv_bias && !qwen2.attention_out_bias && !qwen2.mlp_bias && !qwen2.qk_norm);
  EXPECT_EQ(qwen2.head_dim, 64);
  const ModelConfig qwen3 = Parse(Qwen3());
  EXPECT_TRUE(!qwen3.qkv_bias && !qwen3.attention_out_bias && qwen3.qk_norm);
  EXPECT_EQ(qwen3.head_dim, 128);
  EXPECT_EQ(qwen3.query_heads * qwen3.head_dim, 2 * qwen3.hidden_size);
  for (const ModelConfig& config : {qwen2, qwen3}) {
    for (const LayerConfig& layer : config.layers) EXPECT_EQ(layer.window, 0);
  }
}

TEST(Config, QwenSlidesFromMaxWindowLayersOn) {
  json config = With(With(Qwen2(), "use_sliding_window", true), "max_window_layers", 20);
  for (size_t i = 0; i < 24; ++i) EXPECT_EQ(Parse(config).layers[i].window, i < 20 ? 0 : 32768) << i;
  // A null window slides nowhere.
  for (const LayerConfig& layer : Parse(With(config, "sliding_window", nullptr)).layers)
    EXPECT_EQ(layer.window, 0);
}

TEST(Config, MistralsWindowIsInEveryLayerUnlessItIsNull) {
  for (const LayerConfig& layer : Parse(Mistral()).layers) EXPECT_EQ(layer.window, 4096);
  for (const LayerConfig& layer : Parse(With(Mistral(), "sliding_window", nullptr)).layers)
    EXPECT_EQ(layer.window, 0);
  for (const LayerConfig& layer : Parse(Without(Mistral(), "sliding_window")).layers)
    EXPECT_EQ(layer.window, 4096);
}

// transformers 5 writes rope_parameters, dtype and layer_types for what 4 spelled otherwise.
TEST(Config, NewSpellingsSayTheSame) {
  json llama = Without(Without(Llama32(), "rope_theta"), "rope_scaling");
  llama["rope_parameters"] = Llama32()["rope_scaling"];
  llama["rope_parameters"]["rope_theta"] = 500000.0;
  EXPECT_EQ(Parse(llama), Parse(Llama32()));

  json neox = Without(Without(Pythia1b(), "rotary_pct"), "rotary_emb_base");
  neox["rope_parameters"] = {
      {"rope_type", "default"}, {"rope_theta", 10000}, {"partial_rotary_factor", 0.25}};
  neox["is_decoder"] = false;
  EXPECT_EQ(Parse(neox), Parse(Pythia1b()));
  // 4.50's way: both spellings of the same numbers.
  EXPECT_EQ(Parse(With(With(Pythia1b(), "rope_theta", 10000), "partial_rotary_factor", 0.25)),
            Parse(Pythia1b()));

  json gemma = Without(Without(Gemma3With270m(), "rope_theta"), "rope_local_base_freq");
  gemma.erase("_sliding_window_pattern");
  gemma["rope_parameters"] = {{"full_attention", {{"rope_type", "default"}, {"rope_theta", 1e6}}},
                              {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
  for (int i = 0; i < 18; ++i)
    gemma["layer_types"].push_back(i % 6 == 5 ? "full_attention" : "sliding_attention");
  EXPECT_EQ(Parse(gemma), Parse(Gemma3With270m()));
  gemma["layer_types"][0] = "full_attention";
  EXPECT_EQ(Parse(gemma).layers[0], Parse(gemma).layers[5]);

  json old = Llama32();
  old["rope_scaling"] = {{"type", "linear"}, {"factor", 2.5}};
  EXPECT_EQ(Parse(old).layers[0].rope, (Rope{Rope::Kind::kLinear, 500000, 64, 2.5}));
}

// The numbers are those of transformers' configuration classes.
TEST(Config, FieldsThatAreLeftOutHaveTransformersDefaults) {
  const ModelConfig llama = Parse({{"model_type", "llama"}});
  EXPECT_EQ(llama.vocab_size, 32000);
  EXPECT_EQ(llama.intermediate_size, 11008);
  EXPECT_EQ(llama.kv_heads, 32);
  EXPECT_EQ(llama.head_dim, 128);
  EXPECT_EQ(llama.norm_eps, 1e-6f);
  EXPECT_FALSE(llama.tied_embeddings);
  EXPECT_EQ(llama.bos_token, 1);
  EXPECT_THAT(llama.eos_tokens, ElementsAre(2));
  const ModelConfig mistral = Parse({{"model_type", "mistral"}});
  EXPECT_EQ(mistral.kv_heads, 8);
  EXPECT_EQ(mistral.layers[31].window, 4096);
  EXPECT_EQ(Parse({{"model_type", "mistral"}, {"num_key_value_heads", nullptr}}).kv_heads, 32);
  const ModelConfig qwen2 = Parse({{"model_type", "qwen2"}});
  EXPECT_EQ(qwen2.vocab_size, 151936);
  EXPECT_EQ(qwen2.kv_heads, 32);
  EXPECT_EQ(qwen2.bos_token, std::nullopt);
  EXPECT_TRUE(qwen2.eos_tokens.empty());
  EXPECT_EQ(Parse({{"model_type", "qwen3"}, {"hidden_size", 1024}}).head_dim, 128);
  const ModelConfig neox = Parse({{"model_type", "gpt_neox"}});
  EXPECT_EQ(neox.head_dim, 96);
  EXPECT_EQ(neox.layers.size(), 44u);
  EXPECT_EQ(neox.layers[0].rope, (Rope{Rope::Kind::kDefault, 10000, 24}));
  EXPECT_EQ(neox.norm_eps, 1e-5f);
  const ModelConfig gemma2 = Parse({{"model_type", "gemma2"}});
  EXPECT_EQ(gemma2.head_dim, 256);
  EXPECT_EQ(gemma2.kv_heads, 4);
  EXPECT_EQ(gemma2.logit_softcap, 30);
  EXPECT_EQ(gemma2.attention_softcap, 50);
  EXPECT_EQ(gemma2.attention_scale, 0.0625f);
  EXPECT_EQ(gemma2.layers[0].window, 4096);
  EXPECT_TRUE(gemma2.tied_embeddings);
  const ModelConfig gemma3 = Parse({{"model_type", "gemma3_text"}});
  EXPECT_EQ(gemma3.vocab_size, 262208);
  EXPECT_EQ(gemma3.logit_softcap, 0);
  EXPECT_EQ(gemma3.layers[25].window, 4096);
  EXPECT_EQ(gemma3.layers[23].rope.theta, 1e6);
  // A null softcap is none, also where the default is one.
  EXPECT_EQ(Parse({{"model_type", "gemma2"}, {"attn_logit_softcapping", nullptr}}).attention_softcap, 0);
}

TEST(Config, EveryFieldIsReadOrKnownToBeHarmlessOrRefusedByName) {
  for (const json& config : All()) {
    const std::string family = config["model_type"];
    for (const char* field : {"residual_multiplier", "attention_multiplier", "rope_interleaved",
                              "num_experts", "mscale", "Hidden_size", "sliding_window_sizes"}) {
      EXPECT_THAT(ErrorOf(With(config, field, 1.5)),
                  HasSubstr(std::string("UNIMPLEMENTED: config.json: field \"") + field))
          << family;
    }
    // Not even when it is off: nobody knows what off is.
    EXPECT_THAT(ErrorOf(With(config, "some_switch", false)), HasSubstr("some_switch")) << family;
    EXPECT_EQ(ErrorOf(With(config, "attention_dropout", 0.1)), "OK") << family;
  }
}

TEST(Config, SwitchesThatChangeTheResultAreRefusedUnlessTheyAreOff) {
  for (const json& config : All()) {
    EXPECT_THAT(ErrorOf(With(config, "quantization_config", {{"bits", 4}})),
                HasSubstr("quantization_config"));
    EXPECT_THAT(ErrorOf(With(config, "auto_map", {{"AutoModel", "code.Model"}})), HasSubstr("auto_map"));
    EXPECT_THAT(ErrorOf(With(config, "is_encoder_decoder", true)), HasSubstr("is_encoder_decoder"));
    EXPECT_THAT(ErrorOf(With(config, "use_bidirectional_attention", true)), HasSubstr("UNIMPLEMENTED"));
    EXPECT_THAT(ErrorOf(With(config, "pruned_heads", {{"1", {0}}})), HasSubstr("pruned_heads"));
    EXPECT_EQ(ErrorOf(With(config, "pruned_heads", json::object())), "OK");
    EXPECT_EQ(ErrorOf(With(config, "add_cross_attention", false)), "OK");
  }
}

TEST(Config, OtherArchitecturesAndHeadsAreRefusedByName) {
  for (const char* type : {"mixtral", "gemma", "gemma3", "qwen2_moe", "gpt2", "LLAMA", ""}) {
    EXPECT_THAT(ErrorOf({{"model_type", type}}),
                HasSubstr(std::string("model_type \"") + type + "\" is not implemented"));
  }
  EXPECT_THAT(ErrorOf(With(Llama32(), "architectures", {"LlamaForSequenceClassification"})),
              HasSubstr("LlamaForSequenceClassification"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "architectures", {"MistralForCausalLM"})), HasSubstr("UNIMPLEMENTED"));
  EXPECT_THAT(ErrorOf(json::object()), HasSubstr("no model_type"));
  EXPECT_THAT(ErrorOf(json::array()), HasSubstr("no JSON object"));
}

TEST(Config, RotaryVariantsThatAreNotImplementedAreRefusedByName) {
  for (const char* type : {"yarn", "dynamic", "longrope", "su", "mrope", "proportional"}) {
    for (const char* key : {"type", "rope_type"}) {
      const json scaling = {{key, type}, {"factor", 2.0}, {"original_max_position_embeddings", 8192}};
      for (const json& config : All()) {
        EXPECT_THAT(ErrorOf(With(config, "rope_scaling", scaling)),
                    ::testing::AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr(type)));
      }
    }
  }
  EXPECT_THAT(ErrorOf(With(Qwen2(), "rope_scaling", {{"rope_type", "default"}, {"mrope_section", {1, 2}}})),
              HasSubstr("mrope_section"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "rope_scaling",
                           {{"rope_type", "linear"}, {"factor", 2}, {"attention_factor", 2}})),
              HasSubstr("attention_factor"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "partial_rotary_factor", 0.5)), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "rope_scaling", {{"rope_type", "linear"}})), HasSubstr("factor"));
}

TEST(Config, FieldsAtOddsWithEachOtherAreRefused) {
  EXPECT_THAT(ErrorOf(With(Gemma2With27b(), "hidden_act", "silu")), HasSubstr("hidden_act"));
  EXPECT_THAT(ErrorOf(With(Gemma2With27b(), "sliding_window_size", 1024)), HasSubstr("sliding_window_size"));
  EXPECT_THAT(ErrorOf(With(Gemma3With270m(), "_sliding_window_pattern", 3)),
              HasSubstr("_sliding_window_pattern"));
  EXPECT_THAT(ErrorOf(With(Gemma3With270m(), "attn_logit_softcapping", 50.0)),
              HasSubstr("attn_logit_softcapping"));
  EXPECT_THAT(ErrorOf(With(Pythia1b(), "rope_theta", 500)), HasSubstr("rope_theta"));
  EXPECT_THAT(ErrorOf(With(Pythia1b(), "partial_rotary_factor", 1.0)), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "rope_parameters", {{"rope_type", "default"}})), HasSubstr("not both"));
  EXPECT_THAT(ErrorOf(With(Without(Llama32(), "rope_scaling"), "rope_parameters", {{"rope_theta", 1e4}})),
              HasSubstr("rope_theta"));
  EXPECT_THAT(ErrorOf(With(Qwen2(), "attention_bias", false)), HasSubstr("attention_bias"));
  json slides = Qwen2();
  for (int i = 0; i < 24; ++i) slides["layer_types"].push_back("sliding_attention");
  EXPECT_THAT(ErrorOf(slides), HasSubstr("sliding_window"));
  slides["use_sliding_window"] = true;
  EXPECT_EQ(Parse(slides).layers[0].window, 32768);
  slides["layer_types"][3] = "chunked_attention";
  EXPECT_THAT(ErrorOf(slides), HasSubstr("chunked_attention"));
  json mistral = Mistral();
  for (int i = 0; i < 32; ++i) mistral["layer_types"].push_back("full_attention");
  EXPECT_THAT(ErrorOf(mistral), HasSubstr("layer_types"));
}

TEST(Config, NumbersOutOfRangeAndOfWrongTypesAreRefused) {
  for (const json& config : All()) {
    for (const char* field : {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                              "intermediate_size", "max_position_embeddings"}) {
      for (const json& value :
           std::vector<json>{0, -1, 1.5, "7", true, json::array({1}), 1e300, uint64_t{1} << 63}) {
        EXPECT_THAT(ErrorOf(With(config, field, value)),
                    HasSubstr(std::string("INVALID_ARGUMENT: config.json: ") + field));
      }
    }
  }
  EXPECT_THAT(ErrorOf(With(Llama32(), "num_attention_heads", 31)), HasSubstr("num_key_value_heads"));
  EXPECT_THAT(ErrorOf(With(Pythia1b(), "num_attention_heads", 7)), HasSubstr("hidden_size"));
  EXPECT_THAT(ErrorOf(With(Pythia1b(), "rotary_pct", 0.0)), HasSubstr("rotary embedding over 0 of 256"));
  EXPECT_THAT(ErrorOf(With(Pythia1b(), "rotary_pct", 2)), HasSubstr("rotary_pct"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "hidden_act", "relu")), HasSubstr("\"relu\""));
  EXPECT_THAT(ErrorOf(With(Llama32(), "eos_token_id", 128256)), HasSubstr("eos_token_id"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "eos_token_id", -1)), HasSubstr("eos_token_id"));
  EXPECT_THAT(ErrorOf(With(Llama32(), "layer_types", json::array())), HasSubstr("layer_types"));
  EXPECT_THAT(ErrorOf(With(Gemma2With27b(), "query_pre_attn_scalar", 0)), HasSubstr("query_pre_attn_scalar"));
  json frequencies = Llama32();
  frequencies["rope_scaling"]["high_freq_factor"] = 1.0;
  EXPECT_THAT(ErrorOf(frequencies), HasSubstr("high_freq_factor"));
}

TEST(Config, TextThatIsNoJsonIsRefused) {
  for (const char* text :
       {"", "{", "{\"a\": 1, \"a\": 2}", "{\"a\": NaN}", "{\"\xff\": 1}", "[1,]", "{} {}"}) {
    const auto parsed = ParseModelConfig(text, "config.json");
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  const std::string deep(100000, '[');
  EXPECT_THAT(ParseModelConfig(deep, "config.json").status().ToString(), HasSubstr("nested deeper than 8"));
}

TEST(Config, GenerationEndsWhereGenerationConfigSays) {
  const std::string folder = ::testing::TempDir() + absl::StrCat("config_test_", getpid());
  std::filesystem::create_directories(folder);
  const auto load = [&] { return LoadModelConfig(folder); };
  EXPECT_EQ(load().status().code(), absl::StatusCode::kNotFound);
  eduba::testing::WriteFile(folder + "/config.json", Gemma3With270m().dump());
  EXPECT_THAT(load()->eos_tokens, ElementsAre(1));
  eduba::testing::WriteFile(folder + "/generation_config.json",
                            R"({"eos_token_id": [1, 106], "top_k": 64, "new_field": 1})");
  EXPECT_THAT(load()->eos_tokens, ElementsAre(1, 106));
  eduba::testing::WriteFile(folder + "/generation_config.json", R"({"top_k": 64})");
  EXPECT_THAT(load()->eos_tokens, ElementsAre(1));
  eduba::testing::WriteFile(folder + "/generation_config.json", R"({"eos_token_id": 262144})");
  EXPECT_THAT(load().status().ToString(), HasSubstr("generation_config.json: eos_token_id = 262144"));
  eduba::testing::WriteFile(folder + "/generation_config.json", "[");
  EXPECT_THAT(load().status().ToString(), HasSubstr("generation_config.json: not the JSON"));
  std::filesystem::remove_all(folder);
}

TEST(Config, EmbeddingScaleRoundsAsTheTypeItIsComputedIn) {
  json config = Gemma2With27b();
  config["hidden_size"] = 3072;
  EXPECT_EQ(RoundedEmbeddingScale(Parse(config), DType::kBf16), 55.5f);
  EXPECT_EQ(RoundedEmbeddingScale(Parse(config), DType::kF32), std::sqrt(3072.0f));
  EXPECT_EQ(RoundedEmbeddingScale(Parse(Llama32()), DType::kF16), 1.0f);
}

}  // namespace
}  // namespace eduba
