#include "model/tokenizer/gene_vocabulary.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

constexpr size_t kNameBytesMax = 256;
constexpr absl::string_view kWhiteSpace = " \t\n\v\f\r";

bool IsSpecial(absl::string_view name) {
  return (absl::StartsWith(name, "<") && absl::EndsWith(name, ">")) ||
         (absl::StartsWith(name, "[") && absl::EndsWith(name, "]"));
}

}  // namespace

class GeneVocabulary::Stream : public TextStream {
 public:
  Stream(const GeneVocabulary& vocabulary, const DecodeOptions& options)
      : vocabulary_(vocabulary), options_(options) {}

  std::string Push(int32_t id) override {
    if (id < 0 || id >= vocabulary_.vocab_size()) return "";
    if (options_.skip_special_tokens && id < vocabulary_.special_tokens()) return "";
    return absl::StrCat(std::exchange(first_, false) ? "" : " ", vocabulary_.names_[id]);
  }
  std::string Finish() override { return ""; }

 private:
  const GeneVocabulary& vocabulary_;
  const DecodeOptions options_;
  bool first_ = true;
};

absl::StatusOr<std::unique_ptr<GeneVocabulary>> GeneVocabulary::Parse(absl::string_view text,
                                                                      const std::string& name) {
  auto vocabulary = std::unique_ptr<GeneVocabulary>(new GeneVocabulary());
  EDUBA_RETURN_IF_ERROR(Annotate(CheckUtf8(text), name));
  absl::ConsumeSuffix(&text, "\n");
  int64_t line_number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    const auto bad = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": line ", line_number, " ", what, ", wanted one gene name a line"));
    };
    absl::ConsumeSuffix(&line, "\r");
    if (line.empty()) return bad("is empty");
    if (line.size() > kNameBytesMax) return bad(absl::StrCat("is ", line.size(), " bytes long"));
    if (line.find_first_of(kWhiteSpace) != absl::string_view::npos) {
      return bad("has white space inside a name");
    }
    if (IsSpecial(line)) {
      if (vocabulary->special_tokens_ + 1 < line_number) return bad("is a special token after genes");
      ++vocabulary->special_tokens_;
    }
    const auto id = static_cast<int32_t>(vocabulary->names_.size());
    if (!vocabulary->ids_.emplace(line, id).second) {
      return bad(absl::StrCat("repeats ", JsonText(nlohmann::json(std::string(line)))));
    }
    vocabulary->names_.emplace_back(line);
  }
  return vocabulary;
}

std::optional<int32_t> GeneVocabulary::TokenId(absl::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

absl::StatusOr<std::vector<int32_t>> GeneVocabulary::Encode(absl::string_view text,
                                                            const EncodeOptions&) const {
  EDUBA_RETURN_IF_ERROR(CheckUtf8(text));
  std::vector<int32_t> ids;
  for (const absl::string_view word : absl::StrSplit(text, absl::ByAnyChar(kWhiteSpace), absl::SkipEmpty())) {
    const std::optional<int32_t> id = TokenId(word);
    if (!id.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("word ", ids.size(), " of the text, ", JsonText(nlohmann::json(std::string(word))),
                       ", is no gene of this vocabulary; leave it out or use its other name"));
    }
    ids.push_back(*id);
  }
  return ids;
}

std::unique_ptr<TextStream> GeneVocabulary::NewTextStream(const DecodeOptions& options) const {
  return std::make_unique<Stream>(*this, options);
}

}  // namespace eduba
