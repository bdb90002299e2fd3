#ifndef EDUBA_MODEL_TOKENIZER_GENE_VOCABULARY_H_
#define EDUBA_MODEL_TOKENIZER_GENE_VOCABULARY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

inline constexpr int64_t kGeneVocabularyBytesMax = int64_t{64} << 20;

// One token a gene. The file (genes.txt) has one name a line, UTF-8, without white space inside; the id is
// the number of the line, from 0. Special tokens come first: the leading lines that are in brackets, "<eos>"
// or "[sOS]". A carriage return before the line break is not part of a name; the last line may lack its line
// break; no name appears twice.
//
// Text is names between white space, a cell sentence. Special tokens may be written out. Names are
// case-sensitive.
class GeneVocabulary : public Tokenizer {
 public:
  // kInvalidArgument names the line. `name` begins the messages.
  static absl::StatusOr<std::unique_ptr<GeneVocabulary>> Parse(absl::string_view text,
                                                               const std::string& name);

  int64_t vocab_size() const override { return static_cast<int64_t>(names_.size()); }
  int64_t special_tokens() const { return special_tokens_; }
  std::optional<int32_t> TokenId(absl::string_view token) const override;
  // kInvalidArgument names a word that is no token: a gene that is left out silently would change the answer.
  // Adds no special tokens.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override;
  // Names with one space between them.
  std::unique_ptr<TextStream> NewTextStream(const DecodeOptions& options) const override;

 private:
  class Stream;
  GeneVocabulary() = default;

  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  int64_t special_tokens_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_GENE_VOCABULARY_H_
