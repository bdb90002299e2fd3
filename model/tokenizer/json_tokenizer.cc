#include "model/tokenizer/json_tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

using nlohmann::json;

// Words repeat: one Encode call remembers what became of them.
class WordCache {
 public:
  WordCache(const Bpe& model, std::vector<int32_t>& ids) : model_(model), ids_(ids) {}

  void Encode(absl::string_view word) {
    constexpr size_t kWordBytesMax = 64;
    constexpr size_t kWordsMax = 1 << 16;
    if (word.size() > kWordBytesMax) return model_.EncodeWord(word, ids_);
    const auto found = words_.find(word);
    if (found != words_.end()) {
      ids_.insert(ids_.end(), found->second.begin(), found->second.end());
      return;
    }
    const size_t before = ids_.size();
    model_.EncodeWord(word, ids_);
    if (words_.size() < kWordsMax) {
      words_.emplace(word, std::vector<int32_t>(ids_.begin() + before, ids_.end()));
    }
  }

 private:
  const Bpe& model_;
  std::vector<int32_t>& ids_;
  absl::flat_hash_map<std::string, std::vector<int32_t>> words_;
};

std::string TypeOf(const json& component) {
  const auto type = component.find("type");
  return type != component.end() && type->is_string() ? type->get<std::string>() : "";
}

}  // namespace

class JsonTokenizer::Stream : public TextStream {
 public:
  Stream(const JsonTokenizer& tokenizer, const DecodeOptions& options)
      : tokenizer_(tokenizer), options_(options), decoder_(tokenizer.decoder_) {}

  std::string Push(int32_t id) override {
    absl::string_view token = tokenizer_.model_.Token(id);
    const auto added = tokenizer_.added_by_id_.find(id);
    if (added != tokenizer_.added_by_id_.end()) {
      const AddedToken& entry = tokenizer_.added_[added->second];
      if (entry.special && options_.skip_special_tokens) return "";
      token = entry.written;
    }
    if (token.empty()) return "";
    return decoder_.Push(token);
  }
  std::string Finish() override { return decoder_.Finish(); }

 private:
  const JsonTokenizer& tokenizer_;
  const DecodeOptions options_;
  DecoderStream decoder_;
};

absl::StatusOr<std::unique_ptr<JsonTokenizer>> JsonTokenizer::Parse(absl::string_view text,
                                                                    const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(const json parsed,
                         ParseJson(text, {kTokenizerJsonBytesMax, /*depth_max=*/16}, name));
  if (!parsed.is_object()) return absl::InvalidArgumentError(absl::StrCat(name, ": is no JSON object"));
  JsonFields fields(parsed, name, "a tokenizer.json");
  if (fields.Text("version", "1.0") != "1.0") fields.Refuse("version", "known is 1.0");
  fields.Ignore({"truncation", "padding"});
  const json& normalizer = fields.Get("normalizer");
  const json& pre_tokenizer = fields.Get("pre_tokenizer");
  const json& post_processor = fields.Get("post_processor");
  const json& decoder = fields.Get("decoder");
  const json& model = fields.Get("model");
  const json& added_tokens = fields.Get("added_tokens");
  EDUBA_RETURN_IF_ERROR(fields.Finish());

  auto tokenizer = std::unique_ptr<JsonTokenizer>(new JsonTokenizer());
  EDUBA_ASSIGN_OR_RETURN(tokenizer->normalizer_, Normalizer::Parse(normalizer, name + ": normalizer"));
  EDUBA_ASSIGN_OR_RETURN(tokenizer->pre_tokenizer_,
                         PreTokenizer::Parse(pre_tokenizer, name + ": pre_tokenizer"));
  EDUBA_ASSIGN_OR_RETURN(tokenizer->decoder_, Decoder::Parse(decoder, name + ": decoder"));
  EDUBA_ASSIGN_OR_RETURN(tokenizer->model_, Bpe::Parse(model, name + ": model"));
  tokenizer->vocab_size_ = tokenizer->model_.id_end();
  EDUBA_RETURN_IF_ERROR(tokenizer->ReadAddedTokens(added_tokens, name + ": added_tokens"));
  EDUBA_RETURN_IF_ERROR(tokenizer->ReadPostProcessor(post_processor, name + ": post_processor", 0));
  return tokenizer;
}

absl::Status JsonTokenizer::ReadAddedTokens(const json& tokens, const std::string& name) {
  if (tokens.is_null()) return absl::OkStatus();
  if (!tokens.is_array() || static_cast<int64_t>(tokens.size()) > kVocabularyMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is no list of at most ", kVocabularyMax));
  }
  int64_t largest = -1;
  for (const json& entry : tokens) {
    if (!entry.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " has ", JsonText(entry), ", wanted an object"));
    }
    JsonFields fields(entry, name, "an added token");
    AddedToken token;
    const json& id = fields.Get("id");
    token.content = fields.Text("content", "");
    token.left_strip = fields.Flag("lstrip", false);
    token.right_strip = fields.Flag("rstrip", false);
    token.special = fields.Flag("special", false);
    token.normalized = fields.Flag("normalized", !token.special);
    fields.RefuseUnlessOff({"single_word"});
    if (token.content.empty() || static_cast<int64_t>(token.content.size()) > kTokenBytesMax) {
      fields.Invalid("content", absl::StrCat("1 to ", kTokenBytesMax, " bytes"));
    }
    // The id is not free: a token of the vocabulary keeps its own, others are numbered after them.
    const int64_t expected = model_.Id(token.content).value_or(std::max(model_.size(), largest + 1));
    if (id != expected) fields.Invalid("id", absl::StrCat(expected, " for ", JsonText(json(token.content))));
    EDUBA_RETURN_IF_ERROR(fields.Finish());
    token.id = static_cast<int32_t>(expected);
    token.written = token.content;
    if (token.normalized) {
      EDUBA_ASSIGN_OR_RETURN(token.written, normalizer_.Normalize(token.content));
    }
    largest = std::max(largest, expected);
    vocab_size_ = std::max(vocab_size_, expected + 1);
    const auto index = static_cast<int32_t>(added_.size());
    if (!added_by_content_.emplace(token.content, index).second) {
      return absl::InvalidArgumentError(absl::StrCat(name, " has ", JsonText(json(token.content)), " twice"));
    }
    added_by_id_[token.id] = index;
    added_.push_back(std::move(token));
  }
  // Special tokens first: of two that are written alike after normalization, they count.
  for (const bool special : {true, false}) {
    for (const AddedToken& token : added_) {
      if (token.special == special) (token.normalized ? normalized_finder_ : raw_finder_).Add(token);
    }
  }
  return absl::OkStatus();
}

absl::Status JsonTokenizer::ReadPostProcessor(const json& component, const std::string& name, int depth) {
  constexpr int kDepthMax = 2;
  constexpr size_t kTokensMax = 64;
  if (component.is_null()) return absl::OkStatus();
  if (!component.is_object() || depth > kDepthMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", JsonText(component), ", wanted an object"));
  }
  const std::string type = TypeOf(component);
  JsonFields fields(component, name, type);
  fields.Ignore({"type"});
  if (type == "ByteLevel") {
    fields.Ignore(
        {"add_prefix_space", "trim_offsets", "use_regex"});  // Changes offsets, which are not given.
  } else if (type == "Sequence") {
    const json& parts = fields.Get("processors");
    if (!parts.is_array()) fields.Invalid("processors", "a list");
    for (const json& part : parts) {
      if (fields.ok()) fields.Fail(ReadPostProcessor(part, name, depth + 1));
    }
  } else if (type == "TemplateProcessing") {
    const json& single = fields.Get("single");
    const json& special = fields.Get("special_tokens");
    fields.Ignore({"pair"});  // Text is never encoded in pairs.
    if (!before_.empty() || !after_.empty()) fields.Refuse("single", "one template is applied");
    int texts = 0;
    for (const json& piece : single.is_array() ? single : json::array()) {
      const json& first = piece.is_object() && piece.size() == 1 ? *piece.begin() : json();
      const std::string id = first.is_object() && first.contains("id") && first["id"].is_string()
                                 ? first["id"].get<std::string>()
                                 : "";
      if (piece.is_object() && piece.contains("Sequence") && id == "A") {
        ++texts;
        continue;
      }
      const json ids = piece.is_object() && piece.contains("SpecialToken") && special.is_object() &&
                               special.contains(id) && special[id].is_object() && special[id].contains("ids")
                           ? special[id]["ids"]
                           : json();
      if (!ids.is_array() || ids.size() > kTokensMax || ids.empty()) {
        fields.Invalid("single", "texts (A) and special tokens with ids");
        break;
      }
      for (const json& number : ids) {
        if (!number.is_number_unsigned() || number >= vocab_size_) {
          fields.Invalid("special_tokens", absl::StrCat("ids below ", vocab_size_));
          break;
        }
        (texts == 0 ? before_ : after_).push_back(number.get<int32_t>());
      }
    }
    if (texts != 1 || before_.size() + after_.size() > kTokensMax) {
      fields.Invalid("single", "one text, A, and few tokens");
    }
  } else {
    return absl::UnimplementedError(
        absl::StrCat(name, " of type ", JsonText(component.value("type", json())),
                     " is not supported; known are TemplateProcessing, ByteLevel and Sequence"));
  }
  return fields.Finish();
}

std::optional<int32_t> JsonTokenizer::TokenId(absl::string_view token) const {
  const auto added = added_by_content_.find(token);
  if (added != added_by_content_.end()) return added_[added->second].id;
  return model_.Id(token);
}

absl::StatusOr<std::vector<int32_t>> JsonTokenizer::Encode(absl::string_view text,
                                                           const EncodeOptions& options) const {
  if (static_cast<int64_t>(text.size()) > kEncodeBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("text of ", text.size(), " bytes, at most ",
                                                   kEncodeBytesMax, " at once; encode it in parts"));
  }
  EDUBA_RETURN_IF_ERROR(CheckUtf8(text));
  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = before_;
  WordCache words(model_, ids);
  for (const AddedTokenFinder::Section& section : raw_finder_.Cut(text)) {
    if (section.id >= 0) {
      ids.push_back(section.id);
      continue;
    }
    EDUBA_ASSIGN_OR_RETURN(const std::string normalized,
                           normalizer_.Normalize(text.substr(section.begin, section.end - section.begin)));
    for (const AddedTokenFinder::Section& part : normalized_finder_.Cut(normalized)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      const absl::string_view piece = absl::string_view(normalized).substr(part.begin, part.end - part.begin);
      EDUBA_RETURN_IF_ERROR(pre_tokenizer_.Run(piece, section.begin == 0 && part.begin == 0,
                                               [&](absl::string_view word) { words.Encode(word); }));
    }
  }
  if (options.add_special_tokens) ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

std::unique_ptr<TextStream> JsonTokenizer::NewTextStream(const DecodeOptions& options) const {
  return std::make_unique<Stream>(*this, options);
}

}  // namespace eduba
