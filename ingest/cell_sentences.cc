#include "ingest/cell_sentences.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "ingest/npy.h"

namespace eduba {
namespace {

constexpr int64_t kBlockNumbers = int64_t{1} << 23;
constexpr char kFeatureName[] = "var/feature_name";

}  // namespace

std::vector<int32_t> ExpressedGenes(absl::Span<const double> values) {
  std::vector<int32_t> genes;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] > 0) genes.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(genes.begin(), genes.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return genes;
}

absl::StatusOr<std::unique_ptr<CellSentences>> CellSentences::Open(const std::string& path,
                                                                   const Options& options) {
  std::unique_ptr<CellSentences> cells(new CellSentences());
  EDUBA_ASSIGN_OR_RETURN(cells->file_, H5adFile::Open(path));
  EDUBA_ASSIGN_OR_RETURN(cells->matrix_, cells->file_->OpenMatrix(options.matrix));
  EDUBA_ASSIGN_OR_RETURN(cells->index_, cells->file_->ReadGeneIndex());
  cells->genes_from_ = "the index of var";
  cells->genes_ = cells->index_;
  if (!options.genes.empty() || cells->file_->HasGeneColumn(kFeatureName)) {
    cells->genes_from_ = options.genes.empty() ? kFeatureName : options.genes;
    EDUBA_ASSIGN_OR_RETURN(cells->genes_, cells->file_->ReadGeneColumn(cells->genes_from_));
  }
  const auto columns = static_cast<size_t>(cells->matrix_->cols());
  if (cells->genes_.size() != columns || cells->index_.size() != columns) {
    return absl::InvalidArgumentError(absl::StrCat(cells->matrix_->name(), ": found ", columns,
                                                   " columns, and ", cells->genes_.size(), " genes in ",
                                                   cells->genes_from_, ", wanted one gene for each column"));
  }
  if (options.rows.empty()) {
    cells->rows_.resize(static_cast<size_t>(cells->file_->cells()));
    std::iota(cells->rows_.begin(), cells->rows_.end(), int64_t{0});
  } else {
    EDUBA_ASSIGN_OR_RETURN(cells->rows_, ReadRowList(options.rows, cells->file_->cells()));
  }
  if (cells->rows_.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.rows.empty() ? path : options.rows, ": found no cells, wanted at least one"));
  }
  return cells;
}

int64_t CellSentences::block() const { return std::max<int64_t>(1, kBlockNumbers / matrix_->cols()); }

absl::StatusOr<std::vector<std::vector<int32_t>>> CellSentences::Read(int64_t first, int64_t count) const {
  const int64_t columns = matrix_->cols();
  std::vector<double> values(static_cast<size_t>(count * columns));
  EDUBA_RETURN_IF_ERROR(
      matrix_->ReadRowList(absl::MakeConstSpan(rows_).subspan(first, count), values.data()));
  std::vector<std::vector<int32_t>> sentences;
  for (int64_t cell = 0; cell < count; ++cell) {
    const auto row = absl::MakeConstSpan(values).subspan(cell * columns, columns);
    const auto negative = std::find_if(row.begin(), row.end(), [](double value) { return value < 0; });
    if (negative != row.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(matrix_->name(), ": found ", *negative, " for cell ", rows_[first + cell],
                       " (counted from 0), gene ", genes_[negative - row.begin()],
                       ", wanted expression, 0 or more; centred or scaled values have no order "
                       "to read: name another matrix"));
    }
    sentences.push_back(ExpressedGenes(row));
  }
  return sentences;
}

}  // namespace eduba
