#ifndef EDUBA_INGEST_H5AD_H_
#define EDUBA_INGEST_H5AD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace eduba {

// AnnData files (.h5ad): a matrix of cells, a label for every cell, the cells' names. Reads what anndata 0.5
// to 0.12 wrote: tables as groups or as datasets of records, categories inside the column, under __categories
// or under uns; dense and sparse matrices; gzip and whatever other HDF5 filter is installed. Errors are
// kInvalidArgument, one line, and begin with the file's path, except for kNotFound where there is no such
// file. May be used from several threads; HDF5 works for one at a time.

// A matrix with one row per cell, read in blocks so that it may be larger than memory.
class CellMatrix {
 public:
  virtual ~CellMatrix() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t cols() const = 0;

  // Writes rows [begin, begin + count) to `out`, [count, cols()] in C order, as float32. kInvalidArgument,
  // naming cell and column, where a number is not finite. Costs one pass over the block, except for a matrix
  // stored by columns (CSC): there every call passes over the whole matrix, so ask for large blocks.
  // REQUIRES: the range lies in the matrix.
  absl::Status ReadRows(int64_t begin, int64_t count, float* out) const;

  // The same for rows in any order, repeats and all: row rows[i] to out + i * cols(). Neighbouring rows are
  // read together, so ask for many at a time. REQUIRES: every row lies in the matrix.
  absl::Status ReadRowList(absl::Span<const int64_t> rows, float* out) const;
  // In float64: what is stored wider than float32 keeps its order.
  absl::Status ReadRowList(absl::Span<const int64_t> rows, double* out) const;

  virtual const std::string& name() const = 0;  // "file.h5ad: obsm/X_pca"

 private:
  virtual absl::Status Read(int64_t begin, int64_t count, float* out) const = 0;
  virtual absl::Status Read(int64_t begin, int64_t count, double* out) const = 0;
  template <typename T>
  absl::Status ReadList(absl::Span<const int64_t> rows, T* out) const;
  template <typename T>
  absl::Status CheckFinite(int64_t row, const T* values) const;
};

// One label per cell.
struct CellLabels {
  // The categories in the file's order; in alphabetical order for a column of plain text or numbers.
  std::vector<std::string> names;
  std::vector<int32_t> codes;              // [cells] index into `names`, or kMissing.
  static constexpr int32_t kMissing = -1;  // The cell has no label (pandas' NaN).
};

class H5adFile {
 public:
  static absl::StatusOr<std::unique_ptr<H5adFile>> Open(const std::string& path);
  virtual ~H5adFile() = default;

  virtual int64_t cells() const = 0;

  // `key` is X, layers/NAME or obsm/KEY. The matrix may outlive the file object.
  virtual absl::StatusOr<std::unique_ptr<CellMatrix>> OpenMatrix(const std::string& key) const = 0;

  // `column` is obs/NAME. Text, integers, booleans and categories of these; nullable columns, too.
  virtual absl::StatusOr<CellLabels> ReadLabels(const std::string& column) const = 0;

  // Names (the index of obs) of the cells `rows`, in any order. REQUIRES: every row lies in the file.
  virtual absl::StatusOr<std::vector<std::string>> ReadCellNames(absl::Span<const int64_t> rows) const = 0;

  // Names of the genes, one for each column of X: the index of var, or what `column`, var/NAME, holds (""
  // where a gene has none). As ReadLabels.
  virtual absl::StatusOr<std::vector<std::string>> ReadGeneIndex() const = 0;
  virtual absl::StatusOr<std::vector<std::string>> ReadGeneColumn(const std::string& column) const = 0;
  virtual bool HasGeneColumn(const std::string& column) const = 0;
};

}  // namespace eduba

#endif  // EDUBA_INGEST_H5AD_H_
