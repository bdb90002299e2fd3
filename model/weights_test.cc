#include "model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/testing/safetensors_writer.h"

namespace eduba {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using testing::SafetensorsBytes;
using testing::TensorToWrite;
using testing::WriteFile;

using Shapes = std::map<std::string, std::vector<int64_t>>;

// Small models of every naming. All sizes differ, so that no two axes can be confused.
json Config(const std::string& type) {
  json config = {{"model_type", type},      {"vocab_size", 11},       {"hidden_size", 12},
                 {"intermediate_size", 10}, {"num_hidden_layers", 2}, {"num_attention_heads", 2}};
  if (type != "gpt_neox") {
    config["head_dim"] = 4;
    config["num_key_value_heads"] = 1;
  } else {
    config["rotary_pct"] = 1.0 / 3;
  }
  return config;
}

// The names and shapes that transformers' state_dict has.
Shapes LlamaShapes(bool qkv_bias, bool qk_norm, bool post_norms) {
  Shapes shapes = {{"model.embed_tokens.weight", {11, 12}}, {"model.norm.weight", {12}}};
  for (const std::string at : {"model.layers.0.", "model.layers.1."}) {
    shapes[at + "input_layernorm.weight"] = {12};
    shapes[at + "post_attention_layernorm.weight"] = {12};
    shapes[at + "self_attn.q_proj.weight"] = {8, 12};
    shapes[at + "self_attn.k_proj.weight"] = {4, 12};
    shapes[at + "self_attn.v_proj.weight"] = {4, 12};
    shapes[at + "self_attn.o_proj.weight"] = {12, 8};
    shapes[at + "mlp.gate_proj.weight"] = {10, 12};
    shapes[at + "mlp.up_proj.weight"] = {10, 12};
    shapes[at + "mlp.down_proj.weight"] = {12, 10};
    if (qkv_bias) {
      shapes[at + "self_attn.q_proj.bias"] = {8};
      shapes[at + "self_attn.k_proj.bias"] = {4};
      shapes[at + "self_attn.v_proj.bias"] = {4};
    }
    if (qk_norm) shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = {4};
    if (post_norms) {
      shapes[at + "pre_feedforward_layernorm.weight"] =
          shapes[at + "post_feedforward_layernorm.weight"] = {12};
    }
  }
  return shapes;
}

Shapes NeoXShapes() {
  Shapes shapes = {{"gpt_neox.embed_in.weight", {11, 12}},
                   {"gpt_neox.final_layer_norm.weight", {12}},
                   {"gpt_neox.final_layer_norm.bias", {12}},
                   {"embed_out.weight", {11, 12}}};
  for (const std::string at : {"gpt_neox.layers.0.", "gpt_neox.layers.1."}) {
    for (const std::string norm : {"input_layernorm", "post_attention_layernorm"}) {
      shapes[at + norm + ".weight"] = shapes[at + norm + ".bias"] = {12};
    }
    shapes[at + "attention.query_key_value.weight"] = {36, 12};
    shapes[at + "attention.query_key_value.bias"] = {36};
    shapes[at + "attention.dense.weight"] = {12, 12};
    shapes[at + "attention.dense.bias"] = {12};
    shapes[at + "mlp.dense_h_to_4h.weight"] = {10, 12};
    shapes[at + "mlp.dense_h_to_4h.bias"] = {10};
    shapes[at + "mlp.dense_4h_to_h.weight"] = {12, 10};
    shapes[at + "mlp.dense_4h_to_h.bias"] = {12};
  }
  return shapes;
}

struct Model {
  json config;
  Shapes shapes;
};
Model WithHead(Model model) {
  model.shapes["lm_head.weight"] = {11, 12};
  return model;
}
std::vector<Model> All() {
  return {WithHead({Config("llama"), LlamaShapes(false, false, false)}),
          WithHead({Config("mistral"), LlamaShapes(false, false, false)}),
          WithHead({Config("qwen2"), LlamaShapes(true, false, false)}),
          WithHead({Config("qwen3"), LlamaShapes(false, true, false)}),
          {Config("gemma2"), LlamaShapes(false, false, true)},
          {Config("gemma3_text"), LlamaShapes(false, true, true)},
          {Config("gpt_neox"), NeoXShapes()}};
}

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return elements;
}

class WeightsFolder : public ::testing::Test {
 protected:
  WeightsFolder() : folder_(::testing::TempDir() + absl::StrCat("weights_test_", getpid())) {
    std::filesystem::create_directories(folder_);
  }
  ~WeightsFolder() override { std::filesystem::remove_all(folder_); }

  // Every tensor is filled with a byte of its own.
  absl::StatusOr<LoadedModel> Load(const Model& model, const std::string& dtype = "BF16",
                                   const std::vector<TensorToWrite>& more = {}) {
    WriteFile(folder_ + "/config.json", model.config.dump());
    std::vector<TensorToWrite> tensors;
    const int64_t bytes = dtype == "F32" ? 4 : dtype == "I8" ? 1 : 2;
    for (const auto& [name, shape] : model.shapes) {
      tensors.push_back(
          {name, dtype, shape, std::string(bytes * Elements(shape), static_cast<char>(tensors.size()))});
    }
    tensors.insert(tensors.end(), more.begin(), more.end());
    WriteFile(folder_ + "/model.safetensors", SafetensorsBytes(tensors));
    return LoadModel(folder_);
  }
  std::string ErrorOf(const Model& model, const std::string& dtype = "BF16",
                      const std::vector<TensorToWrite>& more = {}) {
    const auto loaded = Load(model, dtype, more);
    if (loaded.ok()) return "OK";
    EXPECT_FALSE(absl::StrContains(loaded.status().message(), '\n')) << loaded.status();
    return loaded.status().ToString();
  }

  const std::string folder_;
};

TEST_F(WeightsFolder, EveryFamilyFindsItsTensors) {
  for (const Model& model : All()) {
    for (const auto& [stored, dtype] :
         std::map<std::string, DType>{{"F32", DType::kF32}, {"F16", DType::kF16}, {"BF16", DType::kBf16}}) {
      const auto loaded = Load(model, stored);
      ASSERT_TRUE(loaded.ok()) << model.config << loaded.status();
      EXPECT_EQ(loaded->weights.embeddings.dtype, dtype);
      EXPECT_EQ(loaded->weights.layers.size(), 2u);
    }
  }
}

// The views' names, by role.
TEST_F(WeightsFolder, ViewsAreWhatTheyAreCalled) {
  for (const Model& model : All()) {
    const auto loaded = Load(model);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const ModelConfig& config = loaded->config;
    const LayerWeights& layer = loaded->weights.layers[1];
    const bool neox = config.family == ModelFamily::kGptNeoX;
    const auto expect = [&](const WeightView& view, bool present, const std::string& name) {
      ASSERT_EQ(view.present(), present) << name;
      if (!present) return;
      EXPECT_EQ(view.name, name);
      EXPECT_EQ(view.shape, model.shapes.at(name)) << name;
      EXPECT_EQ(view.data, loaded->tensors->tensors().at(name).data) << name;
    };
    const std::string at = neox ? "gpt_neox.layers.1." : "model.layers.1.";
    expect(layer.attention_in.weight, true, at + "input_layernorm.weight");
    expect(layer.attention_in.bias, neox, at + "input_layernorm.bias");
    expect(layer.attention_out.weight, config.post_norms, at + "post_attention_layernorm.weight");
    expect(layer.mlp_in.weight, true,
           at + (config.post_norms ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight"));
    expect(layer.mlp_out.weight, config.post_norms, at + "post_feedforward_layernorm.weight");
    expect(layer.q.weight, !neox, at + "self_attn.q_proj.weight");
    expect(layer.q.bias, !neox && config.qkv_bias, at + "self_attn.q_proj.bias");
    expect(layer.k.weight, !neox, at + "self_attn.k_proj.weight");
    expect(layer.v.weight, !neox, at + "self_attn.v_proj.weight");
    expect(layer.q_norm.weight, config.qk_norm, at + "self_attn.q_norm.weight");
    expect(layer.k_norm.weight, config.qk_norm, at + "self_attn.k_norm.weight");
    expect(layer.fused_qkv.weight, neox, at + "attention.query_key_value.weight");
    expect(layer.fused_qkv.bias, neox, at + "attention.query_key_value.bias");
    expect(layer.o_proj.weight, true, at + (neox ? "attention.dense.weight" : "self_attn.o_proj.weight"));
    expect(layer.gate.weight, !neox, at + "mlp.gate_proj.weight");
    expect(layer.up.weight, true, at + (neox ? "mlp.dense_h_to_4h.weight" : "mlp.up_proj.weight"));
    expect(layer.down.weight, true, at + (neox ? "mlp.dense_4h_to_h.weight" : "mlp.down_proj.weight"));
    expect(loaded->weights.final_norm.weight, true,
           neox ? "gpt_neox.final_layer_norm.weight" : "model.norm.weight");
    expect(loaded->weights.head, true,
           config.tied_embeddings ? "model.embed_tokens.weight"
           : neox                 ? "embed_out.weight"
                                  : "lm_head.weight");
  }
}

TEST_F(WeightsFolder, AMissingTensorIsNamed) {
  for (const Model& model : All()) {
    for (const auto& [name, shape] : model.shapes) {
      Model less = model;
      less.shapes.erase(name);
      EXPECT_THAT(ErrorOf(less), HasSubstr("is missing")) << name;
      EXPECT_THAT(ErrorOf(less), HasSubstr("tensor " + name + " ")) << name;
    }
  }
}

TEST_F(WeightsFolder, AWrongShapeIsNamedWithTheRightOne) {
  for (const Model& model : All()) {
    for (const auto& [name, shape] : model.shapes) {
      Model other = model;
      std::vector<int64_t>& changed = other.shapes[name];
      changed.back() += 1;
      EXPECT_THAT(ErrorOf(other), HasSubstr(absl::StrCat("tensor ", name, " has shape ", ShapeText(changed),
                                                         ", config.json wants ", ShapeText(shape))));
    }
  }
}

TEST_F(WeightsFolder, ATensorThatNothingUsesIsNamed) {
  for (const Model& model : All()) {
    Model more = model;
    more.shapes["model.layers.2.input_layernorm.weight"] = {12};
    EXPECT_THAT(ErrorOf(more), HasSubstr("nothing uses tensor model.layers.2.input_layernorm.weight"));
  }
  Model both = All().back();
  both.shapes["lm_head.weight"] = {11, 12};
  EXPECT_THAT(ErrorOf(both), HasSubstr("nothing uses tensor lm_head.weight"));
}

TEST_F(WeightsFolder, NewerNeoXFilesCallTheHeadByItsNewName) {
  Model model = All().back();
  model.shapes.erase("embed_out.weight");
  model.shapes["lm_head.weight"] = {11, 12};
  const auto loaded = Load(model);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->weights.head.name, "lm_head.weight");
}

TEST_F(WeightsFolder, BuffersOfOldFilesAreLeftOut) {
  EXPECT_EQ(ErrorOf(All().back(), "F16",
                    {{"gpt_neox.layers.0.attention.bias", "BOOL", {1, 1, 2, 2}, "xxxx"},
                     {"gpt_neox.layers.0.attention.masked_bias", "F16", {}, "xx"},
                     {"gpt_neox.layers.1.attention.rotary_emb.inv_freq", "F16", {2}, "xxxx"}}),
            "OK");
  EXPECT_EQ(
      ErrorOf(All().front(), "F16", {{"model.layers.1.self_attn.rotary_emb.inv_freq", "F16", {2}, "xxxx"}}),
      "OK");
}

TEST_F(WeightsFolder, WeightsOfOtherTypesAreRefused) {
  for (const Model& model : All()) EXPECT_THAT(ErrorOf(model, "I8"), HasSubstr("is of dtype I8"));
}

TEST_F(WeightsFolder, ATiedHeadThatIsStoredMustBeTheEmbeddings) {
  Model gemma = All()[4];
  // The same bytes as Load writes into the first tensor, the embeddings.
  const std::string bytes(2 * 11 * 12, '\0');
  const auto head = [&](std::string content) {
    return std::vector<TensorToWrite>{{"lm_head.weight", "BF16", {11, 12}, std::move(content)}};
  };
  EXPECT_EQ(ErrorOf(gemma, "BF16", head(bytes)), "OK");
  std::string other = bytes;
  other.back() = 'x';
  EXPECT_THAT(ErrorOf(gemma, "BF16", head(other)),
              HasSubstr("lm_head.weight is not model.embed_tokens.weight"));
  EXPECT_THAT(ErrorOf(gemma, "BF16", {{"lm_head.weight", "BF16", {11, 11}, std::string(242, '\0')}}),
              HasSubstr("lm_head.weight has shape"));
}

TEST_F(WeightsFolder, AFolderWithoutItsFilesIsNotFound) {
  EXPECT_EQ(LoadModel(folder_).status().code(), absl::StatusCode::kNotFound);
  WriteFile(folder_ + "/config.json", Config("llama").dump());
  EXPECT_EQ(LoadModel(folder_).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace eduba
