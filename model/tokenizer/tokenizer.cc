#include "model/tokenizer/tokenizer.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/read_file.h"
#include "model/tokenizer/gene_vocabulary.h"
#include "model/tokenizer/json_tokenizer.h"
#include "model/tokenizer/sentencepiece_tokenizer.h"

namespace eduba {
namespace {

using nlohmann::json;

// Which tokens go around the text is said beside a tokenizer.model, in tokenizer_config.json.
absl::StatusOr<SentencePieceOptions> ReadSentencePieceOptions(const std::string& folder) {
  constexpr int64_t kBytesMax = int64_t{4} << 20;
  SentencePieceOptions options;
  const std::string path = folder + "/tokenizer_config.json";
  const auto text = ReadWholeFile(path, kBytesMax);
  if (absl::IsNotFound(text.status())) return options;
  EDUBA_RETURN_IF_ERROR(text.status());
  EDUBA_ASSIGN_OR_RETURN(const json config, ParseJson(*text, {kBytesMax, /*depth_max=*/16}, path));
  for (const auto& [field, option] :
       {std::pair{"add_bos_token", &options.add_bos}, {"add_eos_token", &options.add_eos}}) {
    if (!config.is_object() || !config.contains(field) || config[field].is_null()) continue;
    if (!config[field].is_boolean()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", field, " = ", JsonText(config[field]), ", wanted true or false"));
    }
    *option = config[field].get<bool>();
  }
  return options;
}

}  // namespace

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, const DecodeOptions& options) const {
  const std::unique_ptr<TextStream> stream = NewTextStream(options);
  std::string text;
  for (const int32_t id : ids) text += stream->Push(id);
  return text + stream->Finish();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder) {
  std::string path = folder + "/tokenizer.json";
  auto text = ReadWholeFile(path, kTokenizerJsonBytesMax);
  if (text.ok()) return JsonTokenizer::Parse(*text, path);
  if (!absl::IsNotFound(text.status())) return text.status();

  path = folder + "/tokenizer.model";
  text = ReadWholeFile(path, kSentencePieceBytesMax);
  if (text.ok()) {
    EDUBA_ASSIGN_OR_RETURN(const SentencePieceOptions options, ReadSentencePieceOptions(folder));
    return SentencePieceTokenizer::Parse(*text, options, path);
  }
  if (!absl::IsNotFound(text.status())) return text.status();

  path = folder + "/genes.txt";
  text = ReadWholeFile(path, kGeneVocabularyBytesMax);
  if (text.ok()) return GeneVocabulary::Parse(*text, path);
  if (!absl::IsNotFound(text.status())) return text.status();
  return absl::NotFoundError(absl::StrCat(
      folder,
      ": no tokenizer.json, tokenizer.model or genes.txt; put the model's tokenizer beside its weights"));
}

}  // namespace eduba
