#include "cli/cell_tokens.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr char kCellToken[] = "[CELL]";

}  // namespace

absl::StatusOr<std::unique_ptr<CellTokens>> CellTokens::Open(const CellFlags& flags,
                                                             std::unique_ptr<Tokenizer> tokenizer,
                                                             bool special_tokens) {
  std::unique_ptr<CellTokens> cells(new CellTokens());
  cells->path_ = flags.path;
  cells->top_genes_ = flags.top_genes;
  cells->special_tokens_ = special_tokens;
  cells->tokenizer_ = std::move(tokenizer);
  EDUBA_ASSIGN_OR_RETURN(cells->sentences_, CellSentences::Open(flags.path, flags.sentences));
  const auto* vocabulary = dynamic_cast<const GeneVocabulary*>(cells->tokenizer_.get());
  EDUBA_RETURN_IF_ERROR(vocabulary != nullptr ? cells->FindTokens(*vocabulary) : cells->FindNames());
  return cells;
}

absl::Status CellTokens::FindTokens(const GeneVocabulary& vocabulary) {
  one_token_a_gene_ = true;
  const std::optional<int32_t> cell = vocabulary.TokenId(kCellToken);
  if (!cell) {
    return absl::InvalidArgumentError(absl::StrCat("the model's genes.txt has no ", kCellToken,
                                                   ", which begins a cell here; write the sentences as this "
                                                   "model wants them, and append them with --text"));
  }
  cell_token_ = *cell;
  const std::vector<std::string>& names = sentences_->genes();
  const std::vector<std::string>& index = sentences_->index();
  std::map<int32_t, size_t> columns;
  for (size_t i = 0; i < names.size(); ++i) {
    std::optional<int32_t> id = vocabulary.TokenId(names[i]);
    if (!id) id = vocabulary.TokenId(absl::StrCat(names[i], "|", index[i]));
    if (id && *id < vocabulary.special_tokens()) id.reset();
    tokens_.push_back(id.value_or(-1));
    if (!id) {
      ++unknown_genes_;
      continue;
    }
    const auto [other, added] = columns.emplace(*id, i);
    if (!added) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, ": genes ", other->second, " and ", i, " of var are both the model's ",
                       names[i], " by ", sentences_->genes_from(),
                       ", wanted one gene a token: drop one of them, or name another column with --genes"));
    }
  }
  if (unknown_genes_ == genes()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": none of the ", genes(), " genes is in the model's vocabulary; the first is '",
                     names[0], "' by ", sentences_->genes_from(),
                     ", wanted names as in genes.txt: name another column with --genes"));
  }
  return absl::OkStatus();
}

absl::Status CellTokens::FindNames() {
  for (const std::string& name : sentences_->genes()) {
    tokens_.push_back(name.empty() ? -1 : 0);
    unknown_genes_ += name.empty() ? 1 : 0;
  }
  if (unknown_genes_ < genes()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(path_, ": none of the ", genes(), " genes has a name in ",
                                                 sentences_->genes_from(),
                                                 ": name another column with --genes"));
}

absl::StatusOr<std::vector<std::vector<int32_t>>> CellTokens::Next() {
  const int64_t count = std::min(sentences_->block(), cells() - next_);
  std::vector<std::vector<int32_t>> tokens;
  if (count == 0) return tokens;
  EDUBA_ASSIGN_OR_RETURN(std::vector<std::vector<int32_t>> sentences, sentences_->Read(next_, count));
  for (std::vector<int32_t>& columns : sentences) {
    EDUBA_ASSIGN_OR_RETURN(std::vector<int32_t> cell, Encode(std::move(columns), next_++ == 0));
    tokens.push_back(std::move(cell));
  }
  return tokens;
}

absl::StatusOr<std::vector<int32_t>> CellTokens::Encode(std::vector<int32_t> columns, bool first) {
  left_out_ +=
      static_cast<int64_t>(std::erase_if(columns, [&](int32_t column) { return tokens_[column] < 0; }));
  if (top_genes_ > 0 && static_cast<int64_t>(columns.size()) > top_genes_) columns.resize(top_genes_);
  if (one_token_a_gene_) {
    std::vector<int32_t> ids = {cell_token_};
    for (const int32_t column : columns) ids.push_back(tokens_[column]);
    return ids;
  }
  std::string text;
  for (const int32_t column : columns) {
    absl::StrAppend(&text, text.empty() ? "" : " ", sentences_->genes()[column]);
  }
  text += "\n";
  Tokenizer::EncodeOptions options;
  options.add_special_tokens = first && special_tokens_;
  return tokenizer_->Encode(text, options);
}

}  // namespace eduba
