#ifndef EDUBA_CLI_CELL_TOKENS_H_
#define EDUBA_CLI_CELL_TOKENS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ingest/cell_sentences.h"
#include "model/tokenizer/gene_vocabulary.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

// Cells of an .h5ad file, as a command line names them.
struct CellFlags {
  std::string path;
  CellSentences::Options sentences;
  int64_t top_genes = 0;  // Only so many of each cell's genes are read, the most expressed; 0: all.
  std::string ranges_out;
};

// The cells as a model reads them, block by block.
//   A gene vocabulary    [CELL] and one token for each expressed gene, as model/nano/cell_sentences.py has it
//   Any other tokenizer  the genes' names with a space between and a line break after them
// A gene's token is that of its name, or, for a name that several genes share, that of "name|its name in the
// index of var"; genes without one are left out.
class CellTokens {
 public:
  // INVALID_ARGUMENT, NOT_FOUND: as CellSentences::Open; also when no gene has a token, or two genes have the
  // same. `special_tokens`: a text tokenizer's own come before the first cell.
  static absl::StatusOr<std::unique_ptr<CellTokens>> Open(const CellFlags& flags,
                                                          std::unique_ptr<Tokenizer> tokenizer,
                                                          bool special_tokens);

  int64_t cells() const { return sentences_->cells(); }
  // Genes of the file that have no token, of all that it has.
  int64_t unknown_genes() const { return unknown_genes_; }
  int64_t genes() const { return static_cast<int64_t>(sentences_->genes().size()); }
  // Expressed genes of the cells read so far that were left out, for want of a token.
  int64_t left_out() const { return left_out_; }

  // The next cells' tokens, one vector a cell, in order; empty after the last cell.
  absl::StatusOr<std::vector<std::vector<int32_t>>> Next();

 private:
  CellTokens() = default;
  // With `genes_` null.
  absl::Status FindNames();
  absl::Status FindTokens(const GeneVocabulary& vocabulary);
  absl::StatusOr<std::vector<int32_t>> Encode(std::vector<int32_t> columns, bool first);

  std::string path_;
  int64_t top_genes_ = 0;
  bool special_tokens_ = false;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<CellSentences> sentences_;
  bool one_token_a_gene_ = false;
  int32_t cell_token_ = 0;
  std::vector<int32_t> tokens_;  // Each column's token; -1: none. For text: 0 where there is a name.
  int64_t unknown_genes_ = 0;
  int64_t left_out_ = 0;
  int64_t next_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_CLI_CELL_TOKENS_H_
