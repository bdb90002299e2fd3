#ifndef EDUBA_INGEST_CELL_SENTENCES_H_
#define EDUBA_INGEST_CELL_SENTENCES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "ingest/h5ad.h"

// Cells as sentences: the expressed genes of a cell, the most expressed first. The rules are those of
// model/nano/cell_sentences.py: expressed is what is larger than 0, values are ranked as stored (in float64),
// and genes with equal values stand in the order of var.
namespace eduba {

// Columns of the values that are larger than 0, by descending value, equal ones by column.
std::vector<int32_t> ExpressedGenes(absl::Span<const double> values);

// The cells of an .h5ad file, read in blocks, so that the file may be larger than memory.
class CellSentences {
 public:
  struct Options {
    std::string matrix = "X";  // Or layers/NAME: what genes are ranked by.
    std::string genes;  // var/NAME with the genes' names; "": var/feature_name, or var's index without it.
    std::string rows;   // An .npy list of cells; "": all.
  };

  // INVALID_ARGUMENT or NOT_FOUND, one line that begins with a file's path.
  static absl::StatusOr<std::unique_ptr<CellSentences>> Open(const std::string& path, const Options& options);

  int64_t cells() const { return static_cast<int64_t>(rows_.size()); }
  // For every column of the matrix: its gene's name ("" where it has none), and its name in the index of var.
  const std::vector<std::string>& genes() const { return genes_; }
  const std::vector<std::string>& index() const { return index_; }
  // Where genes() come from: "var/feature_name", "the index of var".
  const std::string& genes_from() const { return genes_from_; }

  // Cells that are read at once: 64 MiB of numbers, or one cell.
  int64_t block() const;
  // ExpressedGenes of cells [first, first + count). INVALID_ARGUMENT names a value that is negative or no
  // finite number. REQUIRES: the cells are there.
  absl::StatusOr<std::vector<std::vector<int32_t>>> Read(int64_t first, int64_t count) const;

 private:
  CellSentences() = default;

  std::unique_ptr<H5adFile> file_;
  std::unique_ptr<CellMatrix> matrix_;
  std::vector<int64_t> rows_;
  std::vector<std::string> genes_, index_;
  std::string genes_from_;
};

}  // namespace eduba

#endif  // EDUBA_INGEST_CELL_SENTENCES_H_
