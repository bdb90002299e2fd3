#ifndef EDUBA_CLI_ATLAS_CELLS_H_
#define EDUBA_CLI_ATLAS_CELLS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "atlas/atlas.h"
#include "client/client.h"
#include "ingest/h5ad.h"

namespace eduba {

// The cells of an .h5ad file that a command works on: all, or those that a list of rows names, in its order.
class AtlasCells {
 public:
  // `key` as H5adFile::OpenMatrix; `list`: path of an .npy list of rows, "" for all cells. INVALID_ARGUMENT
  // also when no cell is left.
  static absl::StatusOr<AtlasCells> Open(const std::string& path, const std::string& key,
                                         const std::string& list);

  const H5adFile& file() const { return *file_; }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }
  int64_t dims() const { return matrix_->cols(); }
  // Each cell's row in the file.
  const std::vector<int64_t>& rows() const { return rows_; }

  // Cells [first, first + count) of these, [count, dims()]. Thread-safe.
  absl::Status Read(int64_t first, int64_t count, float* out) const;
  // The cells at `indices` of these, [indices.size(), dims()]. Thread-safe.
  absl::Status ReadAt(const std::vector<int64_t>& indices, float* out) const;

 private:
  std::unique_ptr<H5adFile> file_;
  std::unique_ptr<CellMatrix> matrix_;
  std::vector<int64_t> rows_;
};

// The cells as keys and one-hot labels of their atlas, read as they are sent.
class AtlasRows : public RowSource {
 public:
  // `codes`: the label of every cell. All must outlive the source.
  AtlasRows(const Atlas& atlas, const AtlasCells& cells, const std::vector<int32_t>& codes)
      : atlas_(atlas), cells_(cells), codes_(codes) {}

  DType dtype() const override { return DType::kF32; }
  absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const override;

 private:
  const Atlas& atlas_;
  const AtlasCells& cells_;
  const std::vector<int32_t>& codes_;
};

}  // namespace eduba

#endif  // EDUBA_CLI_ATLAS_CELLS_H_
