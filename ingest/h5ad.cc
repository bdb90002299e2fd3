#include "ingest/h5ad.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "ingest/hdf5_file.h"
#include "ingest/lzf.h"

namespace eduba {
namespace {

using hdf5::Column;
using hdf5::Dataset;
using hdf5::Id;

// Genes are some 60,000 and embeddings some 1,000 wide; a wider matrix is a broken file, and would need its
// row in memory.
constexpr int64_t kColumnsMax = int64_t{1} << 20;
// Rows of a column, or stored elements of a sparse matrix, read at a time.
constexpr int64_t kBlock = int64_t{1} << 18;
// Rows in any order: numbers read at a time, and rows that nobody asked for but are cheaper read than
// skipped.
constexpr int64_t kScratchNumbers = int64_t{1} << 22;
constexpr int64_t kGapRows = 64;
// A category per cell would be no category, and memory for names must end somewhere.
constexpr int64_t kCategoriesMax = int64_t{1} << 20;

absl::Status Invalid(const std::string& message) { return absl::InvalidArgumentError(message); }

// Calls read(begin, end, wanted) for runs of rows [begin, end), of at most `rows_max` rows, that together
// hold all of `rows`; `wanted` are the indices i of which rows[i] lies in the run. Rows that lie close
// together share a run, whatever their order.
absl::Status ForEachPiece(
    absl::Span<const int64_t> rows, int64_t rows_max,
    const std::function<absl::Status(int64_t, int64_t, absl::Span<const size_t>)>& read) {
  std::vector<size_t> order(rows.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rows[a] < rows[b]; });
  for (size_t first = 0; first < order.size();) {
    const int64_t begin = rows[order[first]];
    int64_t end = begin + 1;
    size_t last = first + 1;
    for (; last < order.size(); ++last) {
      const int64_t row = rows[order[last]];
      if (row - end > kGapRows || row + 1 - begin > rows_max) break;
      end = row + 1;
    }
    EDUBA_RETURN_IF_ERROR(read(begin, end, absl::MakeConstSpan(order).subspan(first, last - first)));
    first = last;
  }
  return absl::OkStatus();
}

// --- matrices ---

// X, layers/NAME or obsm/KEY as a dataset of two axes.
class DenseMatrix final : public CellMatrix {
 public:
  explicit DenseMatrix(Dataset data) : data_(std::move(data)) {}
  int64_t rows() const override { return data_.shape()[0]; }
  int64_t cols() const override { return data_.shape()[1]; }
  const std::string& name() const override { return data_.name(); }

 private:
  absl::Status Read(int64_t begin, int64_t count, float* out) const override {
    return data_.Read(H5T_NATIVE_FLOAT, {begin, 0}, {count, cols()}, out);
  }
  absl::Status Read(int64_t begin, int64_t count, double* out) const override {
    return data_.Read(H5T_NATIVE_DOUBLE, {begin, 0}, {count, cols()}, out);
  }

  Dataset data_;
};

// obsm as anndata up to 0.6 wrote it: one dataset of records, one field for each key.
class RecordMatrix final : public CellMatrix {
 public:
  explicit RecordMatrix(Column column) : column_(std::move(column)) {}
  int64_t rows() const override { return column_.size(); }
  int64_t cols() const override { return column_.width(); }
  const std::string& name() const override { return column_.name(); }

 private:
  absl::Status Read(int64_t begin, int64_t count, float* out) const override {
    return column_.ReadNumbers(begin, count, out);
  }
  absl::Status Read(int64_t begin, int64_t count, double* out) const override {
    return column_.ReadNumbers(begin, count, out);
  }

  Column column_;
};

// A group {data, indices, indptr}. Its indices need not be sorted; what is stored twice is added up, as SciPy
// does.
class SparseMatrix final : public CellMatrix {
 public:
  SparseMatrix(std::string name, bool by_rows, int64_t rows, int64_t cols, Column data, Column indices,
               Column starts)
      : name_(std::move(name)),
        by_rows_(by_rows),
        rows_(rows),
        cols_(cols),
        data_(std::move(data)),
        indices_(std::move(indices)),
        starts_(std::move(starts)) {}
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  const std::string& name() const override { return name_; }

 private:
  absl::Status Read(int64_t begin, int64_t count, float* out) const override {
    return ReadAs(begin, count, out);
  }
  absl::Status Read(int64_t begin, int64_t count, double* out) const override {
    return ReadAs(begin, count, out);
  }

  template <typename T>
  absl::Status ReadAs(int64_t begin, int64_t count, T* out) const {
    std::fill(out, out + count * cols_, T{0});
    // The major axis is the one that indptr counts: rows of a CSR matrix, of which the block's are enough;
    // all columns of a CSC matrix.
    const int64_t major_begin = by_rows_ ? begin : 0;
    const int64_t majors = by_rows_ ? count : cols_;
    const int64_t minors = by_rows_ ? cols_ : rows_;
    std::vector<int64_t> starts(static_cast<size_t>(majors) + 1);
    EDUBA_RETURN_IF_ERROR(starts_.ReadIntegers(major_begin, majors + 1, starts.data()));
    if (starts.front() < 0 || starts.back() > data_.size() || !std::is_sorted(starts.begin(), starts.end())) {
      return Invalid(
          absl::StrCat(name_, "/indptr: does not rise from 0 to the ", data_.size(), " stored elements"));
    }
    std::vector<T> values;
    std::vector<int64_t> indices;
    int64_t major = 0;  // From major_begin.
    for (int64_t at = starts.front(); at < starts.back(); at += kBlock) {
      const int64_t size = std::min(kBlock, starts.back() - at);
      values.resize(static_cast<size_t>(size));
      indices.resize(static_cast<size_t>(size));
      EDUBA_RETURN_IF_ERROR(data_.ReadNumbers(at, size, values.data()));
      EDUBA_RETURN_IF_ERROR(indices_.ReadIntegers(at, size, indices.data()));
      for (int64_t i = 0; i < size; ++i) {
        while (at + i >= starts[static_cast<size_t>(major) + 1]) ++major;
        const int64_t minor = indices[static_cast<size_t>(i)];
        if (minor < 0 || minor >= minors) {
          return Invalid(
              absl::StrCat(name_, "/indices: found ", minor, " at ", at + i, ", wanted 0 to below ", minors));
        }
        const int64_t row = by_rows_ ? major : minor - begin;
        const int64_t col = by_rows_ ? minor : major;
        if (row >= 0 && row < count) out[row * cols_ + col] += values[static_cast<size_t>(i)];
      }
    }
    return absl::OkStatus();
  }

  std::string name_;
  bool by_rows_;
  int64_t rows_;
  int64_t cols_;
  Column data_;
  Column indices_;
  Column starts_;
};

absl::StatusOr<std::unique_ptr<CellMatrix>> OpenSparse(const Id& group, const std::string& name) {
  std::string format = hdf5::TextAttribute(group.get(), "encoding-type");
  const char* shape_attribute = "shape";
  if (format.empty()) {  // anndata up to 0.6
    format = hdf5::TextAttribute(group.get(), "h5sparse_format");
    shape_attribute = "h5sparse_shape";
  }
  const bool by_rows = format == "csr_matrix" || format == "csr";
  if (!by_rows && format != "csc_matrix" && format != "csc") {
    return Invalid(absl::StrCat(name, ": found a group of encoding '", format,
                                "', wanted a dense array, csr_matrix or csc_matrix"));
  }
  const auto shape = hdf5::IntegerAttribute(group.get(), shape_attribute, 2);
  if (!shape.ok()) return Annotate(shape.status(), name);
  const int64_t rows = (*shape)[0];
  const int64_t cols = (*shape)[1];
  if (rows < 0 || cols < 0 || rows > kMaxPositions || cols > kColumnsMax) {
    return Invalid(absl::StrCat(name, ": found shape ", rows, " x ", cols, ", wanted at most ", kMaxPositions,
                                " x ", kColumnsMax));
  }
  std::vector<Column> parts;
  for (const char* part : {"data", "indices", "indptr"}) {
    EDUBA_ASSIGN_OR_RETURN(Dataset data, Dataset::Open(group.get(), part, absl::StrCat(name, "/", part)));
    EDUBA_ASSIGN_OR_RETURN(Column column, Column::Of(std::move(data)));
    const bool fits =
        column.kind() == Column::Kind::kInteger || (parts.empty() && column.kind() == Column::Kind::kFloat);
    if (!fits) return Invalid(absl::StrCat(column.name(), ": found ", column.KindText(), ", wanted numbers"));
    parts.push_back(std::move(column));
  }
  const int64_t majors = by_rows ? rows : cols;
  if (parts[2].size() != majors + 1 || parts[1].size() != parts[0].size()) {
    return Invalid(absl::StrCat(name, ": found ", parts[2].size(), " entries in indptr, ", parts[1].size(),
                                " in indices and ", parts[0].size(), " in data, wanted ", majors + 1,
                                " in indptr and the same number in the others"));
  }
  return std::make_unique<SparseMatrix>(name, by_rows, rows, cols, std::move(parts[0]), std::move(parts[1]),
                                        std::move(parts[2]));
}

// --- labels ---

// Text -> code, for a column of plain text or numbers; the names come out in alphabetical order, as pandas'
// categories do.
class LabelIndex {
 public:
  // kInvalidArgument when the column has more different values than labels could have.
  absl::Status Append(const std::string& text, const std::string& column) {
    const auto [entry, added] = codes_.emplace(text, static_cast<int32_t>(codes_.size()));
    if (added && static_cast<int64_t>(codes_.size()) > kCategoriesMax) {
      return Invalid(
          absl::StrCat(column, ": found more than ", kCategoriesMax, " different values, wanted labels"));
    }
    labels_.codes.push_back(entry->second);
    return absl::OkStatus();
  }
  void AppendMissing() { labels_.codes.push_back(CellLabels::kMissing); }

  CellLabels Take() && {
    std::vector<int32_t> sorted(codes_.size());
    for (const auto& [text, code] : codes_) {
      sorted[static_cast<size_t>(code)] = static_cast<int32_t>(labels_.names.size());
      labels_.names.push_back(text);
    }
    for (int32_t& code : labels_.codes) {
      if (code >= 0) code = sorted[static_cast<size_t>(code)];
    }
    return std::move(labels_);
  }

 private:
  std::map<std::string, int32_t> codes_;
  CellLabels labels_;
};

// `mask`, where there is one, is true where the value is missing.
absl::StatusOr<CellLabels> LabelsOfPlain(const Column& values, const Column* mask) {
  LabelIndex index;
  for (int64_t at = 0; at < values.size(); at += kBlock) {
    const int64_t count = std::min(kBlock, values.size() - at);
    EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> texts, values.ReadText(at, count));
    std::vector<int64_t> missing(static_cast<size_t>(count), 0);
    if (mask != nullptr) EDUBA_RETURN_IF_ERROR(mask->ReadIntegers(at, count, missing.data()));
    for (size_t i = 0; i < texts.size(); ++i) {
      if (missing[i] != 0) {
        index.AppendMissing();
      } else {
        EDUBA_RETURN_IF_ERROR(index.Append(texts[i], values.name()));
      }
    }
  }
  return std::move(index).Take();
}

absl::StatusOr<CellLabels> LabelsOfCategories(const Column& codes, const Column& categories) {
  if (codes.kind() != Column::Kind::kInteger) {
    return Invalid(
        absl::StrCat(codes.name(), ": found ", codes.KindText(), ", wanted the integer codes of categories"));
  }
  if (categories.size() > kCategoriesMax) {
    return Invalid(absl::StrCat(categories.name(), ": found ", categories.size(),
                                " categories, wanted at most ", kCategoriesMax));
  }
  CellLabels labels;
  EDUBA_ASSIGN_OR_RETURN(labels.names, categories.ReadText(0, categories.size()));
  std::vector<int64_t> block;
  for (int64_t at = 0; at < codes.size(); at += kBlock) {
    block.resize(static_cast<size_t>(std::min(kBlock, codes.size() - at)));
    EDUBA_RETURN_IF_ERROR(codes.ReadIntegers(at, static_cast<int64_t>(block.size()), block.data()));
    for (size_t i = 0; i < block.size(); ++i) {
      if (block[i] < -1 || block[i] >= categories.size()) {
        return Invalid(absl::StrCat(codes.name(), ": found code ", block[i], " for cell ",
                                    at + static_cast<int64_t>(i), ", wanted -1 (no label) to below ",
                                    categories.size()));
      }
      labels.codes.push_back(static_cast<int32_t>(block[i]));
    }
  }
  return labels;
}

// --- the file ---

class OpenFile final : public H5adFile {
 public:
  OpenFile(std::string path, Id file) : path_(std::move(path)), file_(std::move(file)) {}

  // Finds the table of cells. Call it first.
  absl::Status OpenCells() {
    EDUBA_ASSIGN_OR_RETURN(obs_, OpenTable("obs", "obs (the table of cells)"));
    EDUBA_ASSIGN_OR_RETURN(Column names, OpenColumn(obs_, obs_.index));
    if (names.size() > kMaxPositions) {
      return Invalid(
          absl::StrCat(names.name(), ": found ", names.size(), " cells, wanted at most ", kMaxPositions));
    }
    names_ = std::make_unique<Column>(std::move(names));
    return absl::OkStatus();
  }

  int64_t cells() const override { return names_->size(); }

  absl::StatusOr<std::unique_ptr<CellMatrix>> OpenMatrix(const std::string& key) const override {
    const hdf5::LibraryLock lock;
    EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<CellMatrix> matrix, FindMatrix(key));
    if (matrix->rows() != cells()) {
      return Invalid(absl::StrCat(Named(key), ": found ", matrix->rows(), " rows, wanted one for each of ",
                                  cells(), " cells"));
    }
    if (matrix->cols() < 1 || matrix->cols() > kColumnsMax) {
      return Invalid(
          absl::StrCat(Named(key), ": found ", matrix->cols(), " columns, wanted 1 to ", kColumnsMax));
    }
    return matrix;
  }

  absl::StatusOr<CellLabels> ReadLabels(const std::string& column) const override {
    const hdf5::LibraryLock lock;
    const std::string name(absl::StripPrefix(column, "obs/"));
    if (!absl::StartsWith(column, "obs/") || name.empty()) {
      return Invalid(absl::StrCat(path_, ": found label column '", column, "', wanted obs/NAME"));
    }
    EDUBA_ASSIGN_OR_RETURN(CellLabels labels, FindLabels(obs_, name));
    if (static_cast<int64_t>(labels.codes.size()) != cells()) {
      return Invalid(absl::StrCat(Named(column), ": found ", labels.codes.size(),
                                  " labels, wanted one for each of ", cells(), " cells"));
    }
    return labels;
  }

  absl::StatusOr<std::vector<std::string>> ReadCellNames(absl::Span<const int64_t> rows) const override {
    const hdf5::LibraryLock lock;
    std::vector<std::string> out(rows.size());
    EDUBA_RETURN_IF_ERROR(
        ForEachPiece(rows, kBlock, [&](int64_t begin, int64_t end, absl::Span<const size_t> wanted) {
          EDUBA_CHECK(begin >= 0 && end <= cells());
          EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> names, names_->ReadText(begin, end - begin));
          for (const size_t i : wanted) out[i] = names[static_cast<size_t>(rows[i] - begin)];
          return absl::OkStatus();
        }));
    return out;
  }

  absl::StatusOr<std::vector<std::string>> ReadGeneIndex() const override {
    const hdf5::LibraryLock lock;
    EDUBA_ASSIGN_OR_RETURN(const Table var, OpenTable("var", "var (the table of genes)"));
    EDUBA_ASSIGN_OR_RETURN(const Column names, OpenColumn(var, var.index));
    if (names.size() > kColumnsMax) {
      return Invalid(
          absl::StrCat(names.name(), ": found ", names.size(), " genes, wanted at most ", kColumnsMax));
    }
    return names.ReadText(0, names.size());
  }

  absl::StatusOr<std::vector<std::string>> ReadGeneColumn(const std::string& column) const override {
    const hdf5::LibraryLock lock;
    const std::string name(absl::StripPrefix(column, "var/"));
    if (!absl::StartsWith(column, "var/") || name.empty()) {
      return Invalid(absl::StrCat(path_, ": found gene column '", column, "', wanted var/NAME"));
    }
    EDUBA_ASSIGN_OR_RETURN(const Table var, OpenTable("var", "var (the table of genes)"));
    EDUBA_ASSIGN_OR_RETURN(const CellLabels labels, FindLabels(var, name));
    std::vector<std::string> names;
    for (const int32_t code : labels.codes) names.push_back(code < 0 ? "" : labels.names[code]);
    return names;
  }

  bool HasGeneColumn(const std::string& column) const override {
    const hdf5::LibraryLock lock;
    const auto var = OpenTable("var", "var");
    if (!var.ok()) return false;
    const std::vector<std::string> there = hdf5::ChildNames(var->object());
    return std::find(there.begin(), there.end(), absl::StripPrefix(column, "var/")) != there.end();
  }

 private:
  // obs or var: a table, whichever way it is stored.
  struct Table {
    std::string name;
    Id group;  // One of these two.
    std::shared_ptr<const Dataset> records;
    std::string index;  // The column with the names of its rows.

    hid_t object() const { return records != nullptr ? records->id() : group.get(); }
  };

  std::string Named(const std::string& key) const { return absl::StrCat(path_, ": ", key); }

  absl::StatusOr<Table> OpenTable(const std::string& name, const std::string& what) const {
    if (!hdf5::HasChild(file_.get(), name)) {
      return Invalid(absl::StrCat(path_, ": ", hdf5::MissingText(what, hdf5::ChildNames(file_.get()))));
    }
    Table table;
    table.name = name;
    Id object(H5Oopen(file_.get(), name.c_str(), H5P_DEFAULT));
    if (H5Iget_type(object.get()) == H5I_DATASET) {
      EDUBA_ASSIGN_OR_RETURN(Dataset records, Dataset::Adopt(std::move(object), Named(name)));
      if (!records.is_records()) {
        return Invalid(absl::StrCat(Named(name), ": found an array, wanted a table"));
      }
      table.records = std::make_shared<const Dataset>(std::move(records));
      table.index = H5Tget_member_index(table.records->type(), "index") >= 0 ? "index" : "_index";
    } else if (H5Iget_type(object.get()) == H5I_GROUP) {
      table.index = hdf5::TextAttribute(object.get(), "_index");
      if (table.index.empty()) table.index = hdf5::HasChild(object.get(), "_index") ? "_index" : "index";
      table.group = std::move(object);
    } else {
      return Invalid(absl::StrCat(Named(name), ": found neither a group nor an array, wanted a table"));
    }
    return table;
  }

  // The column of a table, as it is stored: of categories, the codes.
  absl::StatusOr<Column> OpenColumn(const Table& table, const std::string& name) const {
    if (table.records != nullptr) return Column::OfField(table.records, name);
    EDUBA_ASSIGN_OR_RETURN(
        Dataset data, Dataset::Open(table.group.get(), name, Named(absl::StrCat(table.name, "/", name))));
    return Column::Of(std::move(data));
  }

  absl::StatusOr<Column> OpenPart(const Id& group, const std::string& part, const std::string& name) const {
    EDUBA_ASSIGN_OR_RETURN(Dataset data, Dataset::Open(group.get(), part, absl::StrCat(name, "/", part)));
    return Column::Of(std::move(data));
  }

  absl::StatusOr<std::unique_ptr<CellMatrix>> FindMatrix(const std::string& key) const {
    const size_t slash = key.find('/');
    const std::string parent = key.substr(0, slash);
    const bool nested =
        slash != std::string::npos && slash + 1 < key.size() && (parent == "layers" || parent == "obsm");
    if (key != "X" && !nested) {
      return Invalid(absl::StrCat(path_, ": found matrix '", key, "', wanted X, layers/NAME or obsm/KEY"));
    }
    if (!hdf5::HasChild(file_.get(), parent)) {
      return Invalid(absl::StrCat(path_, ": ", hdf5::MissingText(parent, hdf5::ChildNames(file_.get()))));
    }
    Id object(H5Oopen(file_.get(), parent.c_str(), H5P_DEFAULT));
    if (nested) {
      const std::string child = key.substr(slash + 1);
      const std::vector<std::string> there = hdf5::ChildNames(object.get());
      if (std::find(there.begin(), there.end(), child) == there.end()) {
        return Invalid(absl::StrCat(Named(parent), ": ", hdf5::MissingText(child, there)));
      }
      if (H5Iget_type(object.get()) == H5I_DATASET) {
        EDUBA_ASSIGN_OR_RETURN(Dataset records, Dataset::Adopt(std::move(object), Named(parent)));
        EDUBA_ASSIGN_OR_RETURN(Column column,
                               Column::OfField(std::make_shared<Dataset>(std::move(records)), child));
        EDUBA_RETURN_IF_ERROR(WantNumbers(column.kind(), column.KindText(), column.name()));
        return std::make_unique<RecordMatrix>(std::move(column));
      }
      object = Id(H5Oopen(object.get(), child.c_str(), H5P_DEFAULT));
    }
    switch (H5Iget_type(object.get())) {
      case H5I_GROUP:
        return OpenSparse(object, Named(key));
      case H5I_DATASET: {
        EDUBA_ASSIGN_OR_RETURN(Dataset data, Dataset::Adopt(std::move(object), Named(key)));
        if (data.shape().size() != 2) {
          return Invalid(absl::StrCat(Named(key), ": found 1 axis, wanted 2 (cells, numbers)"));
        }
        const H5T_class_t type_class = H5Tget_class(data.type());
        const bool number = type_class == H5T_FLOAT || type_class == H5T_INTEGER;
        if (!number) {
          return Invalid(absl::StrCat(Named(key), ": found no numbers in it, wanted floats or integers"));
        }
        return std::make_unique<DenseMatrix>(std::move(data));
      }
      default:
        return Invalid(absl::StrCat(Named(key), ": found neither an array nor a group, wanted a matrix"));
    }
  }

  static absl::Status WantNumbers(Column::Kind kind, const std::string& found, const std::string& name) {
    if (kind == Column::Kind::kInteger || kind == Column::Kind::kFloat) return absl::OkStatus();
    return Invalid(absl::StrCat(name, ": found ", found, ", wanted floats or integers"));
  }

  absl::StatusOr<CellLabels> FindLabels(const Table& table, const std::string& name) const {
    std::vector<std::string> there = hdf5::ChildNames(table.object());
    there.erase(std::remove_if(there.begin(), there.end(),
                               [&](const std::string& child) {
                                 return child == "__categories" || child == table.index;
                               }),
                there.end());
    if (std::find(there.begin(), there.end(), name) == there.end()) {
      return Invalid(
          absl::StrCat(Named(table.name), ": ", hdf5::MissingText(absl::StrCat("column ", name), there)));
    }
    return table.records != nullptr ? LabelsOfField(table, name) : LabelsOfChild(table, name);
  }

  // anndata up to 0.6: the codes are a field, the categories lie under uns.
  absl::StatusOr<CellLabels> LabelsOfField(const Table& table, const std::string& name) const {
    EDUBA_ASSIGN_OR_RETURN(const Column column, OpenColumn(table, name));
    const std::string categories = absl::StrCat("uns/", name, "_categories");
    if (column.kind() != Column::Kind::kInteger || !hdf5::HasChild(file_.get(), "uns") ||
        !hdf5::HasChild(file_.get(), categories)) {
      return LabelsOfPlain(column, nullptr);
    }
    EDUBA_ASSIGN_OR_RETURN(const Column names, OpenPart(file_, categories, path_));
    return LabelsOfCategories(column, names);
  }

  absl::StatusOr<CellLabels> LabelsOfChild(const Table& table, const std::string& name) const {
    const std::string full = Named(absl::StrCat(table.name, "/", name));
    Id child(H5Oopen(table.group.get(), name.c_str(), H5P_DEFAULT));
    if (H5Iget_type(child.get()) == H5I_GROUP) {
      if (hdf5::HasChild(child.get(), "codes")) {  // anndata from 0.8
        EDUBA_ASSIGN_OR_RETURN(const Column codes, OpenPart(child, "codes", full));
        EDUBA_ASSIGN_OR_RETURN(const Column categories, OpenPart(child, "categories", full));
        return LabelsOfCategories(codes, categories);
      }
      if (hdf5::HasChild(child.get(), "mask")) {  // a nullable column
        EDUBA_ASSIGN_OR_RETURN(const Column values, OpenPart(child, "values", full));
        EDUBA_ASSIGN_OR_RETURN(const Column mask, OpenPart(child, "mask", full));
        if (mask.kind() != Column::Kind::kBoolean || mask.size() != values.size()) {
          return Invalid(absl::StrCat(full, "/mask: found ", mask.size(), " ", mask.KindText(), ", wanted ",
                                      values.size(), " booleans"));
        }
        return LabelsOfPlain(values, &mask);
      }
      return Invalid(absl::StrCat(full, ": found a group of encoding '",
                                  hdf5::TextAttribute(child.get(), "encoding-type"),
                                  "', wanted categories, text, integers or booleans"));
    }
    if (H5Iget_type(child.get()) != H5I_DATASET) {
      return Invalid(absl::StrCat(full, ": found no array, wanted a column"));
    }
    EDUBA_ASSIGN_OR_RETURN(Dataset data, Dataset::Adopt(std::move(child), full));
    if (H5Aexists(data.id(), "categories") <= 0) {
      EDUBA_ASSIGN_OR_RETURN(const Column column, Column::Of(std::move(data)));
      return LabelsOfPlain(column, nullptr);
    }
    // anndata 0.7: the codes carry a reference to their categories.
    EDUBA_ASSIGN_OR_RETURN(Dataset categories,
                           FollowReference(data, absl::StrCat(full, " (its categories)")));
    EDUBA_ASSIGN_OR_RETURN(const Column codes, Column::Of(std::move(data)));
    EDUBA_ASSIGN_OR_RETURN(const Column names, Column::Of(std::move(categories)));
    return LabelsOfCategories(codes, names);
  }

  static absl::StatusOr<Dataset> FollowReference(const Dataset& data, const std::string& name) {
    const Id attribute(H5Aopen(data.id(), "categories", H5P_DEFAULT));
    const Id type(attribute.ok() ? H5Aget_type(attribute.get()) : -1);
    const Id space(attribute.ok() ? H5Aget_space(attribute.get()) : -1);
    hobj_ref_t reference = 0;
    if (!type.ok() || !space.ok() || H5Tequal(type.get(), H5T_STD_REF_OBJ) <= 0 ||
        H5Sget_simple_extent_npoints(space.get()) != 1 ||
        H5Aread(attribute.get(), H5T_STD_REF_OBJ, &reference) < 0) {
      return Invalid(absl::StrCat(name, ": found no reference to them"));
    }
    Id target(H5Rdereference2(data.id(), H5P_DEFAULT, H5R_OBJECT, &reference));
    if (!target.ok() || H5Iget_type(target.get()) != H5I_DATASET) {
      return hdf5::Error(absl::StrCat(name, ": the reference leads to no array"));
    }
    return Dataset::Adopt(std::move(target), name);
  }

  std::string path_;
  Id file_;
  Table obs_;
  std::unique_ptr<Column> names_;
};

}  // namespace

template <typename T>
absl::Status CellMatrix::CheckFinite(int64_t row, const T* values) const {
  for (int64_t i = 0; i < cols(); ++i) {
    if (std::isfinite(values[i])) continue;
    return Invalid(absl::StrCat(name(), ": found ", values[i], " for cell ", row,
                                " (counted from 0), column ", i,
                                ", wanted finite numbers; drop or fill such cells first"));
  }
  return absl::OkStatus();
}

absl::Status CellMatrix::ReadRows(int64_t begin, int64_t count, float* out) const {
  const hdf5::LibraryLock lock;
  EDUBA_CHECK(begin >= 0 && count >= 0 && count <= rows() && begin <= rows() - count);
  EDUBA_RETURN_IF_ERROR(Read(begin, count, out));
  for (int64_t i = 0; i < count; ++i) EDUBA_RETURN_IF_ERROR(CheckFinite(begin + i, out + i * cols()));
  return absl::OkStatus();
}

absl::Status CellMatrix::ReadRowList(absl::Span<const int64_t> rows, float* out) const {
  return ReadList(rows, out);
}

absl::Status CellMatrix::ReadRowList(absl::Span<const int64_t> rows, double* out) const {
  return ReadList(rows, out);
}

template <typename T>
absl::Status CellMatrix::ReadList(absl::Span<const int64_t> rows, T* out) const {
  const hdf5::LibraryLock lock;
  std::vector<T> scratch;
  return ForEachPiece(rows, std::max<int64_t>(1, kScratchNumbers / cols()),
                      [&](int64_t begin, int64_t end, absl::Span<const size_t> wanted) {
                        EDUBA_CHECK(begin >= 0 && end <= this->rows());
                        scratch.resize(static_cast<size_t>((end - begin) * cols()));
                        EDUBA_RETURN_IF_ERROR(Read(begin, end - begin, scratch.data()));
                        for (const size_t i : wanted) {
                          const T* row = &scratch[static_cast<size_t>((rows[i] - begin) * cols())];
                          EDUBA_RETURN_IF_ERROR(CheckFinite(rows[i], row));
                          std::copy(row, row + cols(), out + static_cast<int64_t>(i) * cols());
                        }
                        return absl::OkStatus();
                      });
}

absl::StatusOr<std::unique_ptr<H5adFile>> H5adFile::Open(const std::string& path) {
  const hdf5::LibraryLock lock;
  RegisterLzfFilter();
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(path, ": cannot open"));
  }
  if (!S_ISREG(info.st_mode)) {
    return Invalid(absl::StrCat(
        path, ": found no regular file, wanted an .h5ad file (a .zarr folder must be converted first)"));
  }
  if (access(path.c_str(), R_OK) != 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(path, ": cannot open"));
  }
  if (H5Fis_hdf5(path.c_str()) <= 0) {
    return Invalid(absl::StrCat(path, ": not an HDF5 file (", info.st_size,
                                " bytes without its signature), wanted an .h5ad file"));
  }
  Id file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT));
  if (!file.ok()) {
    return hdf5::Error(absl::StrCat(path, ": truncated or broken; write or copy the file again"));
  }
  auto out = std::make_unique<OpenFile>(path, std::move(file));
  EDUBA_RETURN_IF_ERROR(out->OpenCells());
  return out;
}

}  // namespace eduba
