#include "model/config.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/families/families.h"
#include "model/families/parts.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/read_file.h"

namespace eduba {
namespace {

using nlohmann::json;

struct FamilyEntry {
  ModelFamily family;
  const char* model_type;
  const char* architecture;
  void (*parse)(JsonFields&, ModelConfig&);
};
constexpr FamilyEntry kFamilies[] = {
    {ModelFamily::kLlama, "llama", "LlamaForCausalLM", ParseLlama},
    {ModelFamily::kMistral, "mistral", "MistralForCausalLM", ParseLlama},
    {ModelFamily::kQwen2, "qwen2", "Qwen2ForCausalLM", ParseLlama},
    {ModelFamily::kQwen3, "qwen3", "Qwen3ForCausalLM", ParseLlama},
    {ModelFamily::kGptNeoX, "gpt_neox", "GPTNeoXForCausalLM", ParseGptNeoX},
    {ModelFamily::kGemma2, "gemma2", "Gemma2ForCausalLM", ParseGemma},
    {ModelFamily::kGemma3, "gemma3_text", "Gemma3ForCausalLM", ParseGemma},
};

absl::StatusOr<const FamilyEntry*> FindFamily(const json& config, const std::string& name) {
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": has no model_type; is it a model's config.json?"));
  }
  const auto* entry = std::find_if(std::begin(kFamilies), std::end(kFamilies),
                                   [&](const FamilyEntry& known) { return *type == known.model_type; });
  if (entry == std::end(kFamilies)) {
    std::string known;
    for (const FamilyEntry& family : kFamilies) {
      absl::StrAppend(&known, known.empty() ? "" : ", ", family.model_type);
    }
    return absl::UnimplementedError(
        absl::StrCat(name, ": model_type ", JsonText(*type), " is not implemented; known are ", known));
  }
  // A classifier or a bare trunk of the same family has other tensors and other answers.
  const auto architectures = config.find("architectures");
  if (architectures == config.end() || architectures->is_null()) return entry;
  if (!architectures->is_array() || architectures->size() != 1 ||
      (*architectures)[0] != entry->architecture) {
    return absl::UnimplementedError(absl::StrCat(name, ": architectures ", JsonText(*architectures),
                                                 " is not implemented, wanted [\"", entry->architecture,
                                                 "\"]"));
  }
  return entry;
}

std::vector<int32_t> TokenIds(JsonFields& fields, const std::string& field, int64_t vocab_size) {
  const json& value = fields.Get(field);
  std::vector<int32_t> ids;
  for (const json& id : value.is_array() ? value : value.is_null() ? json::array() : json::array({value})) {
    if (id.is_number_integer() && id >= 0 && id < vocab_size) {
      ids.push_back(id.get<int32_t>());
    } else {
      fields.Invalid(field, absl::StrCat("token ids below vocab_size, ", vocab_size));
      break;
    }
  }
  return ids;
}

// Reads the fields that every family has.
void ParseCommon(JsonFields& fields, ModelConfig& config) {
  // Absent means transformers' default for the family; null means none.
  const bool llama = config.family == ModelFamily::kLlama || config.family == ModelFamily::kMistral;
  const bool gemma = config.family == ModelFamily::kGemma2 || config.family == ModelFamily::kGemma3;
  const bool neox = config.family == ModelFamily::kGptNeoX;
  if (fields.Has("bos_token_id")) {
    const std::vector<int32_t> bos = TokenIds(fields, "bos_token_id", config.vocab_size);
    if (bos.size() > 1) fields.Invalid("bos_token_id", "one token id");
    if (!bos.empty()) config.bos_token = bos[0];
  } else if (llama || gemma || neox) {
    config.bos_token = llama ? 1 : gemma ? 2 : 0;
  }
  if (fields.Has("eos_token_id")) {
    config.eos_tokens = TokenIds(fields, "eos_token_id", config.vocab_size);
  } else if (llama || gemma || neox) {
    config.eos_tokens = {gemma ? 1 : 2};
  }
  // Defaults may lie beyond a tiny model.
  if (config.bos_token.value_or(0) >= config.vocab_size) config.bos_token.reset();
  std::erase_if(config.eos_tokens, [&](int32_t id) { return id >= config.vocab_size; });

  // Says where a file comes from, how a model was trained, what a caller wants back, or how it is run.
  fields.Ignore({"model_type",
                 "architectures",
                 "transformers_version",
                 "_name_or_path",
                 "name_or_path",
                 "_commit_hash",
                 "torch_dtype",
                 "dtype",
                 "use_cache",
                 "initializer_range",
                 "attention_dropout",
                 "pad_token_id",
                 "sep_token_id",
                 "decoder_start_token_id",
                 "is_decoder",
                 "output_hidden_states",
                 "output_attentions",
                 "return_dict",
                 "id2label",
                 "label2id",
                 "num_labels",
                 "problem_type",
                 "finetuning_task",
                 "task_specific_params",
                 "tokenizer_class",
                 "prefix",
                 "torchscript",
                 "use_bfloat16",
                 "tf_legacy_loss",
                 "pretraining_tp",
                 "chunk_size_feed_forward",
                 "gradient_checkpointing",
                 "attn_implementation",
                 "_attn_implementation",
                 "_attn_implementation_autoset",
                 "_attn_implementation_internal",
                 "_experts_implementation_internal",
                 "_flash_attn_2_enabled",
                 "cache_implementation",
                 "unsloth_fixed",
                 "unsloth_version"});
  // How transformers generates by default. A request says it here.
  fields.Ignore({"max_length",
                 "min_length",
                 "do_sample",
                 "early_stopping",
                 "num_beams",
                 "num_beam_groups",
                 "diversity_penalty",
                 "temperature",
                 "top_k",
                 "top_p",
                 "typical_p",
                 "repetition_penalty",
                 "length_penalty",
                 "no_repeat_ngram_size",
                 "encoder_no_repeat_ngram_size",
                 "bad_words_ids",
                 "num_return_sequences",
                 "output_scores",
                 "return_dict_in_generate",
                 "forced_bos_token_id",
                 "forced_eos_token_id",
                 "remove_invalid_values",
                 "exponential_decay_length_penalty",
                 "suppress_tokens",
                 "begin_suppress_tokens"});
  fields.RefuseUnlessOff({"is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder",
                          "cross_attention_hidden_size", "pruned_heads", "use_bidirectional_attention",
                          "quantization_config", "compression_config", "auto_map", "per_layer_config",
                          "use_mrope", "tie_last_hidden_states"});
}

}  // namespace

const char* ModelFamilyName(ModelFamily family) {
  for (const FamilyEntry& entry : kFamilies) {
    if (entry.family == family) return entry.model_type;
  }
  EDUBA_CHECK(false);
  return "";
}

float RoundedEmbeddingScale(const ModelConfig& config, DType dtype) {
  float rounded = 0;
  StoreElement(&rounded, dtype, 0, config.embedding_scale);
  return LoadElement(&rounded, dtype, 0);
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(const json parsed, ParseJson(text, {kModelConfigBytesMax, /*depth_max=*/8}, name));
  if (!parsed.is_object()) return absl::InvalidArgumentError(absl::StrCat(name, ": is no JSON object"));
  EDUBA_ASSIGN_OR_RETURN(const FamilyEntry* entry, FindFamily(parsed, name));
  ModelConfig config;
  config.family = entry->family;
  JsonFields fields(parsed, name, entry->model_type);
  entry->parse(fields, config);
  if (fields.ok()) ParseCommon(fields, config);
  EDUBA_RETURN_IF_ERROR(fields.Finish());
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& folder) {
  std::string path = folder + "/config.json";
  EDUBA_ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(path, kModelConfigBytesMax));
  EDUBA_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(text, path));

  path = folder + "/generation_config.json";
  const auto generation = ReadWholeFile(path, kModelConfigBytesMax);
  if (absl::IsNotFound(generation.status())) return config;
  EDUBA_RETURN_IF_ERROR(generation.status());
  EDUBA_ASSIGN_OR_RETURN(const json parsed,
                         ParseJson(*generation, {kModelConfigBytesMax, /*depth_max=*/8}, path));
  if (!parsed.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": is no JSON object"));
  JsonFields fields(parsed, path, ModelFamilyName(config.family));
  std::vector<int32_t> eos = TokenIds(fields, "eos_token_id", config.vocab_size);
  EDUBA_RETURN_IF_ERROR(fields.status());
  if (!eos.empty()) config.eos_tokens = std::move(eos);
  return config;
}

}  // namespace eduba
