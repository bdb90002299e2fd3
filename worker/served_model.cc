#include "worker/served_model.h"

#include <xxhash.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "model/read_file.h"
#include "model/session_defaults.h"
#include "model/tokenizer/gene_vocabulary.h"
#include "model/tokenizer/json_tokenizer.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// The hash of everything that decides what the model computes. It is equal for a model in one file and in
// shards.
uint64_t HashOf(const std::string& config, const Safetensors& tensors) {
  XXH64_hash_t hash = XXH3_64bits(config.data(), config.size());
  for (const auto& [name, tensor] : tensors.tensors()) {
    hash = XXH3_64bits_withSeed(name.data(), name.size(), hash);
    hash = XXH3_64bits_withSeed(tensor.dtype.data(), tensor.dtype.size(), hash);
    hash = XXH3_64bits_withSeed(tensor.data, static_cast<size_t>(tensor.bytes), hash);
  }
  return hash;
}

// The last name of the path as it was given: a link to a folder has the link's name.
std::string NameOf(const std::filesystem::path& given, const std::filesystem::path& canonical) {
  std::filesystem::path path = given.lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  const std::string name = path.filename().string();
  return name.empty() || name == "." || name == ".." ? canonical.filename().string() : name;
}

v1::ModelSpec ToProto(const SessionDefaults& defaults) {
  v1::ModelSpec spec;
  if (defaults.policy == "model") spec.set_policy(v1::MODEL_POLICY_MODEL);
  if (defaults.policy == "streaming") spec.set_policy(v1::MODEL_POLICY_STREAMING);
  if (defaults.policy == "star") spec.set_policy(v1::MODEL_POLICY_STAR);
  if (defaults.positions == "absolute") spec.set_positions(v1::POSITION_MODE_ABSOLUTE);
  if (defaults.positions == "rolling") spec.set_positions(v1::POSITION_MODE_ROLLING);
  if (defaults.positions == "clamped") spec.set_positions(v1::POSITION_MODE_CLAMPED);
  spec.set_window(defaults.window.value_or(0));
  if (defaults.sink_tokens) spec.set_sink_tokens(*defaults.sink_tokens);
  if (defaults.sink_token_id) spec.set_sink_token(*defaults.sink_token_id);
  return spec;
}

// What LoadTokenizer has read: its kind, and what the ranks of a group must have alike to find the same stop
// strings.
absl::Status DescribeTokenizer(const std::filesystem::path& folder, v1::Model& info) {
  struct {
    const char* kind;
    const char* file;
    int64_t bytes_max;
  } const kinds[] = {{"json", "tokenizer.json", kTokenizerJsonBytesMax},
                     {"sentencepiece", "tokenizer.model", kSentencePieceBytesMax},
                     {"genes", "genes.txt", kGeneVocabularyBytesMax}};
  for (const auto& known : kinds) {
    const auto text = ReadWholeFile((folder / known.file).string(), known.bytes_max);
    if (absl::IsNotFound(text.status())) continue;
    EDUBA_RETURN_IF_ERROR(text.status());
    info.set_tokenizer(known.kind);
    info.set_tokenizer_hash(XXH3_64bits(text->data(), text->size()));
    break;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServedModel>> ServedModel::Load(const std::string& folder,
                                                               std::unique_ptr<LayerKernels> kernels) {
  std::unique_ptr<ServedModel> model(new ServedModel());
  model->kernels_ = std::move(kernels);
  EDUBA_ASSIGN_OR_RETURN(model->loaded_, LoadModel(folder));
  EDUBA_ASSIGN_OR_RETURN(
      model->transformer_,
      Transformer::Create(model->loaded_.config, model->loaded_.weights, model->kernels_.get()));
  auto tokenizer = LoadTokenizer(folder);
  if (!tokenizer.ok() && !absl::IsNotFound(tokenizer.status())) return tokenizer.status();
  if (tokenizer.ok()) model->tokenizer_ = *std::move(tokenizer);

  std::error_code error;
  std::filesystem::path path = std::filesystem::canonical(folder, error);
  if (error) path = folder;
  EDUBA_ASSIGN_OR_RETURN(const std::string config_text,
                         ReadWholeFile((path / "config.json").string(), kModelConfigBytesMax));
  const ModelConfig& config = model->loaded_.config;
  v1::Model& info = model->info_;
  info.set_name(NameOf(folder, path));
  info.set_folder(path.string());
  info.set_family(ModelFamilyName(config.family));
  info.set_vocab_size(config.vocab_size);
  info.set_hidden_size(config.hidden_size);
  info.set_trained_positions(config.trained_positions);
  if (model->tokenizer_ != nullptr) EDUBA_RETURN_IF_ERROR(DescribeTokenizer(path, info));
  for (const auto& [name, tensor] : model->loaded_.tensors->tensors()) {
    info.set_bytes(info.bytes() + tensor.bytes);
  }
  info.set_hash(HashOf(config_text, *model->loaded_.tensors));
  info.set_query_heads(config.query_heads);
  info.set_kv_heads(config.kv_heads);
  info.set_head_dim(config.head_dim);
  info.set_dtype(DTypeToProto(model->kv_dtype()));
  for (const LayerConfig& layer : config.layers) info.add_layer_windows(layer.window);
  if (config.bos_token) info.set_bos_token(*config.bos_token);
  for (const int32_t token : config.eos_tokens) info.add_eos_tokens(token);
  EDUBA_ASSIGN_OR_RETURN(const std::optional<SessionDefaults> defaults, LoadSessionDefaults(path.string()));
  if (defaults) {
    *info.mutable_session_defaults() = ToProto(*defaults);
    // What nobody could create a session with is a mistake in the file.
    v1::SessionSpec spec;
    spec.mutable_model();
    EDUBA_RETURN_IF_ERROR(
        Annotate(CompleteModelSpec(spec, info).status(), (path / "streaming.json").string()));
  }
  return model;
}

}  // namespace eduba
