#include "cli/atlas_cells.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "ingest/npy.h"

namespace eduba {

absl::StatusOr<AtlasCells> AtlasCells::Open(const std::string& path, const std::string& key,
                                            const std::string& list) {
  AtlasCells cells;
  EDUBA_ASSIGN_OR_RETURN(cells.file_, H5adFile::Open(path));
  EDUBA_ASSIGN_OR_RETURN(cells.matrix_, cells.file_->OpenMatrix(key));
  if (list.empty()) {
    cells.rows_.resize(static_cast<size_t>(cells.file_->cells()));
    std::iota(cells.rows_.begin(), cells.rows_.end(), int64_t{0});
  } else {
    EDUBA_ASSIGN_OR_RETURN(cells.rows_, ReadRowList(list, cells.file_->cells()));
  }
  if (cells.rows_.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(list.empty() ? path : list, ": found no cells, wanted at least one"));
  }
  return cells;
}

absl::Status AtlasCells::Read(int64_t first, int64_t count, float* out) const {
  return matrix_->ReadRowList(absl::MakeConstSpan(rows_).subspan(first, count), out);
}

absl::Status AtlasCells::ReadAt(const std::vector<int64_t>& indices, float* out) const {
  std::vector<int64_t> rows;
  rows.reserve(indices.size());
  for (const int64_t index : indices) rows.push_back(rows_[static_cast<size_t>(index)]);
  return matrix_->ReadRowList(rows, out);
}

absl::Status AtlasRows::Read(int /*layer*/, int64_t first, int64_t count, void* keys, void* values) const {
  std::vector<float> cells(static_cast<size_t>(count * cells_.dims()));
  EDUBA_RETURN_IF_ERROR(cells_.Read(first, count, cells.data()));
  EDUBA_RETURN_IF_ERROR(EncodeKeys(
      atlas_, cells, first, {static_cast<float*>(keys), static_cast<size_t>(count * atlas_.head_dim())}));
  EncodeValues(atlas_, absl::MakeConstSpan(codes_).subspan(first, count),
               {static_cast<float*>(values), static_cast<size_t>(count * atlas_.value_dim())});
  return absl::OkStatus();
}

}  // namespace eduba
