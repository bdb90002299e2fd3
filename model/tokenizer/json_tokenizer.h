#ifndef EDUBA_MODEL_TOKENIZER_JSON_TOKENIZER_H_
#define EDUBA_MODEL_TOKENIZER_JSON_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/bpe.h"
#include "model/tokenizer/decoder.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/pre_tokenizer.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

// Gemma's is 33 MB.
inline constexpr int64_t kTokenizerJsonBytesMax = int64_t{128} << 20;

// The BPE tokenizers of Hugging Face's tokenizers library, from a tokenizer.json. What the file says of
// truncation and padding is not applied, as in transformers, where the caller says it.
class JsonTokenizer : public Tokenizer {
 public:
  // `name` begins the messages. kUnimplemented: a component or field that is not supported, by name.
  static absl::StatusOr<std::unique_ptr<JsonTokenizer>> Parse(absl::string_view text,
                                                              const std::string& name);

  int64_t vocab_size() const override { return vocab_size_; }
  std::optional<int32_t> TokenId(absl::string_view token) const override;
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override;
  std::unique_ptr<TextStream> NewTextStream(const DecodeOptions& options) const override;

 private:
  class Stream;

  absl::Status ReadAddedTokens(const nlohmann::json& tokens, const std::string& name);
  absl::Status ReadPostProcessor(const nlohmann::json& component, const std::string& name, int depth);

  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Bpe model_;
  Decoder decoder_;
  std::vector<AddedToken> added_;
  absl::flat_hash_map<int32_t, int32_t> added_by_id_;           // id -> index in added_
  absl::flat_hash_map<std::string, int32_t> added_by_content_;  // content -> index in added_
  AddedTokenFinder raw_finder_;         // Tokens that are looked for before normalization,
  AddedTokenFinder normalized_finder_;  // and after.
  std::vector<int32_t> before_;         // The template's tokens around the text.
  std::vector<int32_t> after_;
  int64_t vocab_size_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_JSON_TOKENIZER_H_
