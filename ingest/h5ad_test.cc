#include "ingest/h5ad.h"

#include <hdf5.h>
#include <unistd.h>
#include <zlib.h>

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "ingest/testing/h5ad_builder.h"

namespace eduba {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::unique_ptr<H5adFile> OpenOrDie(const std::string& path) {
  auto file = H5adFile::Open(path);
  EXPECT_TRUE(file.ok()) << file.status();
  return file.ok() ? *std::move(file) : nullptr;
}

std::vector<float> AllRows(const CellMatrix& matrix, int64_t block) {
  std::vector<float> out(static_cast<size_t>(matrix.rows() * matrix.cols()));
  for (int64_t at = 0; at < matrix.rows(); at += block) {
    const int64_t count = std::min(block, matrix.rows() - at);
    const absl::Status status = matrix.ReadRows(at, count, &out[static_cast<size_t>(at * matrix.cols())]);
    EXPECT_TRUE(status.ok()) << status;
  }
  return out;
}

template <typename T>
std::string MessageOf(const absl::StatusOr<T>& result) {
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()), ::testing::Not(HasSubstr("\n")));
  return std::string(result.status().message());
}

// anndata from 0.8 on.
TEST(H5ad, ReadsCategoriesAsAGroup) {
  H5adBuilder build("modern");
  build.Cells({"c0", "c1", "c2"});
  build.Group("obs/kind");
  build.Numbers<int64_t>("obs/kind/codes", {3}, H5T_STD_I8LE, {1, -1, 0});
  build.Texts("obs/kind/categories", {"B cell", "β"});
  build.Group("obsm");
  build.Numbers<float>("obsm/X_pca", {3, 2}, H5T_IEEE_F32LE, {0, 1, 2, 3, 4, 5});
  const auto file = OpenOrDie(build.Done());
  EXPECT_EQ(file->cells(), 3);
  EXPECT_THAT(file->ReadCellNames({2, 0, 2}).value(), ElementsAre("c2", "c0", "c2"));
  const CellLabels labels = file->ReadLabels("obs/kind").value();
  EXPECT_THAT(labels.names, ElementsAre("B cell", "β"));
  EXPECT_THAT(labels.codes, ElementsAre(1, CellLabels::kMissing, 0));
  const auto matrix = file->OpenMatrix("obsm/X_pca");
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_THAT(AllRows(**matrix, 2), ElementsAre(0, 1, 2, 3, 4, 5));
}

// anndata 0.7: the codes refer to __categories.
TEST(H5ad, ReadsCategoriesByReference) {
  H5adBuilder build("reference");
  build.Cells({"c0", "c1"}, Text::kFixed);
  build.Group("obs/__categories");
  build.Texts("obs/__categories/kind", {"x", "y"});
  build.Numbers<int64_t>("obs/kind", {2}, H5T_STD_I16BE, {1, 0});
  build.ReferenceAttribute("obs/kind", "categories", "obs/__categories/kind");
  const auto file = OpenOrDie(build.Done());
  const CellLabels labels = file->ReadLabels("obs/kind").value();
  EXPECT_THAT(labels.names, ElementsAre("x", "y"));
  EXPECT_THAT(labels.codes, ElementsAre(1, 0));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/other")),
              HasSubstr("obs: found no column other; there is kind"));
}

// anndata up to 0.6: tables are datasets of records, categories lie under uns.
TEST(H5ad, ReadsTablesOfRecords) {
  struct Cell {
    char index[4];
    int8_t kind;
    int64_t batch;
    float score;
  };
  struct Embedding {
    float pca[2];
    double depth;
  };
  H5adBuilder build("records");
  const std::vector<Cell> cells = {{{'a', 'b', 'c', 'd'}, 1, 7, 0.5f}, {{'e', 0, 0, 0}, -1, 12, 1.0f}};
  const std::vector<Embedding> embeddings = {{{1, 2}, 10}, {{3, 4}, 20}};
  const hsize_t size = 2;
  const hid_t space = H5Screate_simple(1, &size, nullptr);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, 4);
  H5Tset_strpad(text, H5T_STR_NULLPAD);
  const hid_t cell = H5Tcreate(H5T_COMPOUND, sizeof(Cell));
  H5Tinsert(cell, "index", HOFFSET(Cell, index), text);
  H5Tinsert(cell, "kind", HOFFSET(Cell, kind), H5T_NATIVE_INT8);
  H5Tinsert(cell, "batch", HOFFSET(Cell, batch), H5T_NATIVE_INT64);
  H5Tinsert(cell, "score", HOFFSET(Cell, score), H5T_NATIVE_FLOAT);
  const hid_t obs = H5Dcreate2(build.file(), "obs", cell, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Dwrite(obs, cell, H5S_ALL, H5S_ALL, H5P_DEFAULT, cells.data()), 0);
  const hid_t pair = H5Tarray_create2(H5T_NATIVE_FLOAT, 1, &size);
  const hid_t embedding = H5Tcreate(H5T_COMPOUND, sizeof(Embedding));
  H5Tinsert(embedding, "X_pca", HOFFSET(Embedding, pca), pair);
  H5Tinsert(embedding, "depth", HOFFSET(Embedding, depth), H5T_NATIVE_DOUBLE);
  const hid_t obsm =
      H5Dcreate2(build.file(), "obsm", embedding, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(H5Dwrite(obsm, embedding, H5S_ALL, H5S_ALL, H5P_DEFAULT, embeddings.data()), 0);
  for (const hid_t id : {obs, obsm}) H5Dclose(id);
  for (const hid_t id : {text, cell, pair, embedding}) H5Tclose(id);
  H5Sclose(space);
  build.Group("uns");
  build.Texts("uns/kind_categories", {"B", "T"}, Text::kFixed);

  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(file->ReadCellNames({0, 1}).value(), ElementsAre("abcd", "e"));
  const CellLabels kind = file->ReadLabels("obs/kind").value();
  EXPECT_THAT(kind.names, ElementsAre("B", "T"));
  EXPECT_THAT(kind.codes, ElementsAre(1, CellLabels::kMissing));
  EXPECT_THAT(file->ReadLabels("obs/batch").value().names, ElementsAre("12", "7"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/score")), HasSubstr("obs/score: found floats, wanted text"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/no")),
              HasSubstr("found no column no; there is batch, kind, score"));
  EXPECT_THAT(AllRows(*file->OpenMatrix("obsm/X_pca").value(), 1), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(AllRows(*file->OpenMatrix("obsm/depth").value(), 2), ElementsAre(10, 20));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/X_umap")),
              HasSubstr("obsm: found no X_umap; there is X_pca, depth"));
}

TEST(H5ad, OneCategoryMayBeAScalar) {
  H5adBuilder build("scalar");
  build.Cells({"a"});
  build.Group("obs/kind");
  build.Numbers<int64_t>("obs/kind/codes", {1}, H5T_STD_I8LE, {0});
  build.Texts("obs/kind/categories", {"only"}, Text::kVariable, /*scalar=*/true);
  EXPECT_THAT(OpenOrDie(build.Done())->ReadLabels("obs/kind").value().names, ElementsAre("only"));
}

TEST(H5ad, PlainAndNullableColumnsBecomeSortedLabels) {
  H5adBuilder build("plain");
  build.Cells({"a", "b", "c", "d"});
  build.Texts("obs/text", {"T", "B", "T", ""});
  build.Texts("obs/fixed", {"exactly8", "B", "B", "T"}, Text::kFixed);
  build.Numbers<int64_t>("obs/number", {4}, H5T_STD_U16LE, {3, 1, 3, 2});
  build.Booleans("obs/flag", {1, 0, 1, 1});
  build.Group("obs/nullable");
  build.Numbers<int64_t>("obs/nullable/values", {4}, H5T_STD_I64LE, {5, 6, 5, 0});
  build.Booleans("obs/nullable/mask", {0, 0, 0, 1});
  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(file->ReadLabels("obs/text").value().names, ElementsAre("", "B", "T"));
  EXPECT_THAT(file->ReadLabels("obs/text").value().codes, ElementsAre(2, 1, 2, 0));
  EXPECT_THAT(file->ReadLabels("obs/fixed").value().names, ElementsAre("B", "T", "exactly8"));
  EXPECT_THAT(file->ReadLabels("obs/number").value().codes, ElementsAre(2, 0, 2, 1));
  EXPECT_THAT(file->ReadLabels("obs/flag").value().names, ElementsAre("False", "True"));
  EXPECT_THAT(file->ReadLabels("obs/nullable").value().names, ElementsAre("5", "6"));
  EXPECT_THAT(file->ReadLabels("obs/nullable").value().codes, ElementsAre(0, 1, 0, CellLabels::kMissing));
}

// [[0, 1.5, 0], [0, 0, 0], [2, 0, 3], [0, 4, 0]] with indices out of order and one element in two parts.
void BuildSparse(H5adBuilder& build, const std::string& path, bool by_rows, bool legacy) {
  build.Group(path);
  if (legacy) {
    build.TextAttribute(path, "h5sparse_format", by_rows ? "csr" : "csc");
    build.IntegerAttribute(path, "h5sparse_shape", {4, 3});
  } else {
    build.TextAttribute(path, "encoding-type", by_rows ? "csr_matrix" : "csc_matrix");
    build.IntegerAttribute(path, "shape", {4, 3});
  }
  if (by_rows) {
    build.Numbers<float>(path + "/data", {5}, H5T_IEEE_F64LE, {1.5, 3, 2, 1, 3});
    build.Numbers<int64_t>(path + "/indices", {5}, H5T_STD_U8LE, {1, 2, 0, 1, 1});
    build.Numbers<int64_t>(path + "/indptr", {5}, H5T_STD_I64LE, {0, 1, 1, 3, 5});
  } else {
    build.Numbers<float>(path + "/data", {5}, H5T_IEEE_F32LE, {2, 3, 1.5, 1, 3});
    build.Numbers<int64_t>(path + "/indices", {5}, H5T_STD_I32LE, {2, 3, 0, 3, 2});
    build.Numbers<int64_t>(path + "/indptr", {4}, H5T_STD_I32LE, {0, 1, 4, 5});
  }
}

TEST(H5ad, ReadsSparseMatricesInBlocksOfAnySize) {
  H5adBuilder build("sparse");
  build.Cells({"a", "b", "c", "d"});
  BuildSparse(build, "X", /*by_rows=*/true, /*legacy=*/false);
  build.Group("layers");
  BuildSparse(build, "layers/csc", /*by_rows=*/false, /*legacy=*/false);
  BuildSparse(build, "layers/old_csr", /*by_rows=*/true, /*legacy=*/true);
  BuildSparse(build, "layers/old_csc", /*by_rows=*/false, /*legacy=*/true);
  const auto file = OpenOrDie(build.Done());
  for (const char* key : {"X", "layers/csc", "layers/old_csr", "layers/old_csc"}) {
    const auto matrix = file->OpenMatrix(key);
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    for (const int64_t block : {1, 2, 3, 4}) {
      EXPECT_THAT(AllRows(**matrix, block), ElementsAre(0, 1.5, 0, 0, 0, 0, 2, 0, 3, 0, 4, 0))
          << key << " " << block;
    }
  }
}

TEST(H5ad, ReadsEveryNumberTypeAndGzip) {
  H5adBuilder build("types");
  build.Cells({"a", "b"});
  build.Group("layers");
  const std::vector<hid_t> types = {H5T_STD_I8LE, H5T_STD_U16BE, H5T_STD_I64LE, H5T_IEEE_F32BE,
                                    H5T_IEEE_F64LE};
  for (size_t i = 0; i < types.size(); ++i) {
    build.Numbers<float>(absl::StrCat("layers/", i), {2, 2}, types[i], {1, 2, 3, 4});
  }
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {1, 2};
  H5Pset_chunk(plist, 2, chunk);
  H5Pset_shuffle(plist);
  H5Pset_deflate(plist, 4);
  build.Numbers<float>("X", {2, 2}, H5T_IEEE_F32LE, {1, 2, 3, 4}, plist);
  H5Pclose(plist);
  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(AllRows(*file->OpenMatrix("X").value(), 1), ElementsAre(1, 2, 3, 4));
  for (size_t i = 0; i < types.size(); ++i) {
    EXPECT_THAT(AllRows(*file->OpenMatrix(absl::StrCat("layers/", i)).value(), 2), ElementsAre(1, 2, 3, 4));
  }
}

TEST(H5ad, ReadsBlocksAcrossCompressedChunks) {
  // Chunks that end beyond both edges, and elements wider in memory than in the file, and narrower.
  constexpr int kRows = 7;
  constexpr int kColumns = 8;
  std::vector<float> values(kRows * kColumns);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 3) - 50;
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {2, 3};
  H5Pset_chunk(plist, 2, chunk);
  H5Pset_shuffle(plist);
  H5Pset_deflate(plist, 4);
  H5adBuilder build("blocks");
  build.Cells({"a", "b", "c", "d", "e", "f", "g"});
  build.Group("layers");
  build.Numbers<float>("X", {kRows, kColumns}, H5T_IEEE_F32LE, values, plist);
  build.Numbers<float>("layers/i16", {kRows, kColumns}, H5T_STD_I16BE, values, plist);
  build.Numbers<float>("layers/f64", {kRows, kColumns}, H5T_IEEE_F64LE, values, plist);
  H5Pclose(plist);
  const auto file = OpenOrDie(build.Done());
  for (const char* name : {"X", "layers/i16", "layers/f64"}) {
    const auto matrix = file->OpenMatrix(name).value();
    for (int first = 0; first < kRows; ++first) {
      for (int count = 1; first + count <= kRows; ++count) {
        std::vector<float> rows(static_cast<size_t>(count) * kColumns, -1.0f);
        ASSERT_TRUE(matrix->ReadRows(first, count, rows.data()).ok());
        const auto begin = values.begin() + first * kColumns;
        EXPECT_EQ(rows, std::vector<float>(begin, begin + count * kColumns)) << name << " " << first;
      }
    }
  }
}

TEST(H5ad, ReadsLzf) {
  H5Zunregister(32000);  // Ours cannot write; without any the array is created all the same, and its chunk
                         // given as it is.
  H5adBuilder build("lzf");
  build.Cells({"a", "b"});
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {2, 2};
  H5Pset_chunk(plist, 2, chunk);
  const unsigned parameters[3] = {4, 261, 4};  // h5py's: filter version, LZF version, bytes of a chunk
  H5Pset_filter(plist, 32000, H5Z_FLAG_OPTIONAL, 3, parameters);
  const hsize_t size[2] = {2, 2};
  const hid_t space = H5Screate_simple(2, size, nullptr);
  const hid_t set = H5Dcreate2(build.file(), "X", H5T_STD_I8LE, space, H5P_DEFAULT, plist, H5P_DEFAULT);
  const hsize_t origin[2] = {0, 0};
  const unsigned char block[4] = {0x00, 7, 0x20, 0x00};  // 7, and three copies of it
  ASSERT_GE(H5Dwrite_chunk(set, H5P_DEFAULT, 0, origin, sizeof(block), block), 0);
  H5Dclose(set);
  H5Sclose(space);
  H5Pclose(plist);
  EXPECT_THAT(AllRows(*OpenOrDie(build.Done())->OpenMatrix("X").value(), 2), ElementsAre(7, 7, 7, 7));
}

TEST(H5ad, ReadsRowsInAnyOrder) {
  H5adBuilder build("rows");
  std::vector<std::string> names;
  std::vector<float> values;
  for (int i = 0; i < 500; ++i) {
    names.push_back(absl::StrCat(i));
    values.push_back(static_cast<float>(i));
    values.push_back(static_cast<float>(-i));
  }
  values[2 * 3] = std::numeric_limits<float>::quiet_NaN();  // Row 3 lies between rows 2 and 7: read with
                                                            // them, but not asked for.
  build.Cells(names);
  build.Numbers<float>("X", {500, 2}, H5T_IEEE_F32LE, values);
  const auto file = OpenOrDie(build.Done());
  const auto matrix = file->OpenMatrix("X").value();
  std::vector<float> out(12);
  ASSERT_TRUE(matrix->ReadRowList({499, 7, 2, 7, 300, 0}, out.data()).ok());
  EXPECT_THAT(out, ElementsAre(499, -499, 7, -7, 2, -2, 7, -7, 300, -300, 0, 0));
  EXPECT_TRUE(matrix->ReadRowList({}, static_cast<float*>(nullptr)).ok());
  EXPECT_THAT(std::string(matrix->ReadRowList({4, 3}, out.data()).message()),
              HasSubstr("found nan for cell 3"));
}

TEST(H5ad, AMatrixOutlivesItsFile) {
  H5adBuilder build("outlives");
  build.Cells({"a"});
  build.Numbers<float>("X", {1, 2}, H5T_IEEE_F32LE, {1, 2});
  auto file = OpenOrDie(build.Done());
  const auto matrix = file->OpenMatrix("X").value();
  file.reset();
  EXPECT_THAT(AllRows(*matrix, 1), ElementsAre(1, 2));
}

TEST(H5ad, MissingPiecesAreNamedBesideWhatThereIs) {
  H5adBuilder build("missing");
  build.Cells({"a"});
  build.Group("obsm");
  build.Numbers<float>("obsm/X_pca", {1, 2}, H5T_IEEE_F32LE, {1, 2});
  const std::string path = build.Done();
  const auto file = OpenOrDie(path);
  EXPECT_THAT(MessageOf(file->OpenMatrix("X")),
              AllOf(StartsWith(path), HasSubstr("found no X; there is obs, obsm")));
  EXPECT_THAT(MessageOf(file->OpenMatrix("layers/counts")), HasSubstr("found no layers"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/no")), HasSubstr("obsm: found no no; there is X_pca"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("uns/x")), HasSubstr("wanted X, layers/NAME or obsm/KEY"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/")), HasSubstr("wanted X, layers/NAME or obsm/KEY"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/kind")), HasSubstr("found no column kind: there is nothing"));
  EXPECT_THAT(MessageOf(file->ReadLabels("kind")), HasSubstr("wanted obs/NAME"));
  H5adBuilder empty("no_obs");
  empty.Group("uns");
  EXPECT_THAT(MessageOf(H5adFile::Open(empty.Done())),
              HasSubstr("found no obs (the table of cells); there is uns"));
}

TEST(H5ad, WrongShapesAndTypesAreNamed) {
  H5adBuilder build("wrong");
  build.Cells({"a", "b"});
  build.Group("obsm");
  build.Numbers<float>("obsm/one_axis", {2}, H5T_IEEE_F32LE, {1, 2});
  build.Numbers<float>("obsm/three_axes", {2, 1, 1}, H5T_IEEE_F32LE, {1, 2});
  build.Numbers<float>("obsm/three_cells", {3, 1}, H5T_IEEE_F32LE, {1, 2, 3});
  build.Texts("obsm/text", {"a", "b"});
  build.Group("obsm/frame");
  build.TextAttribute("obsm/frame", "encoding-type", "dataframe");
  build.Numbers<float>("obsm/no_columns", {2, 0}, H5T_IEEE_F32LE, {});
  build.Numbers<float>("obs/score", {2}, H5T_IEEE_F32LE, {1, 2});
  build.Numbers<int64_t>("obs/short", {1}, H5T_STD_I64LE, {1});
  build.Group("obs/odd");
  build.TextAttribute("obs/odd", "encoding-type", "awkward-array");
  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/one_axis")), HasSubstr("found 1 axis, wanted 2"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/three_axes")), HasSubstr("found 3 axes"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/three_cells")),
              HasSubstr("found 3 rows, wanted one for each of 2 cells"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/frame")), HasSubstr("found a group of encoding 'dataframe'"));
  EXPECT_THAT(MessageOf(file->OpenMatrix("obsm/no_columns")), HasSubstr("found 0 columns"));
  EXPECT_FALSE(file->OpenMatrix("obsm/text").ok());
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/score")), HasSubstr("found floats, wanted text, integers"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/short")),
              HasSubstr("found 1 labels, wanted one for each of 2 cells"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/odd")), HasSubstr("encoding 'awkward-array'"));
}

TEST(H5ad, NumbersThatAreNotFiniteAreNamedByCell) {
  H5adBuilder build("nan");
  build.Cells({"a", "b", "c"});
  build.Numbers<float>("X", {3, 2}, H5T_IEEE_F32LE, {0, 0, 0, 0, 0, std::numeric_limits<float>::quiet_NaN()});
  build.Group("layers");
  build.Numbers<double>("layers/huge", {3, 1}, H5T_IEEE_F64LE, {1e300, 0, 0});
  const auto file = OpenOrDie(build.Done());
  const auto matrix = file->OpenMatrix("X").value();
  std::vector<float> rows(4);
  EXPECT_TRUE(matrix->ReadRows(0, 2, rows.data()).ok());
  EXPECT_THAT(std::string(matrix->ReadRows(1, 2, rows.data()).message()),
              HasSubstr("X: found nan for cell 2 (counted from 0), column 1"));
  EXPECT_THAT(std::string(file->OpenMatrix("layers/huge").value()->ReadRows(0, 3, rows.data()).message()),
              HasSubstr("found inf for cell 0"));
}

TEST(H5ad, BrokenCategoriesAreRefused) {
  H5adBuilder build("codes");
  build.Cells({"a", "b"});
  for (const std::string name : {"high", "low", "floats"}) {
    build.Group("obs/" + name);
    build.Texts("obs/" + name + "/categories", {"x", "y"});
  }
  build.Numbers<int64_t>("obs/high/codes", {2}, H5T_STD_I8LE, {0, 2});
  build.Numbers<int64_t>("obs/low/codes", {2}, H5T_STD_I8LE, {-2, 0});
  build.Numbers<float>("obs/floats/codes", {2}, H5T_IEEE_F32LE, {0, 1});
  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/high")),
              HasSubstr("found code 2 for cell 1, wanted -1 (no label) to below 2"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/low")), HasSubstr("found code -2 for cell 0"));
  EXPECT_THAT(MessageOf(file->ReadLabels("obs/floats")), HasSubstr("wanted the integer codes"));
}

TEST(H5ad, BrokenSparseMatricesAreRefused) {
  H5adBuilder build("broken_sparse");
  build.Cells({"a", "b"});
  build.Group("layers");
  const auto sparse = [&](const std::string& path, const std::vector<int64_t>& indices,
                          const std::vector<int64_t>& indptr, const std::vector<int64_t>& shape) {
    build.Group(path);
    build.TextAttribute(path, "encoding-type", "csr_matrix");
    build.IntegerAttribute(path, "shape", shape);
    build.Numbers<float>(path + "/data", {2}, H5T_IEEE_F32LE, {1, 2});
    build.Numbers<int64_t>(path + "/indices", {indices.size()}, H5T_STD_I64LE, indices);
    build.Numbers<int64_t>(path + "/indptr", {indptr.size()}, H5T_STD_I64LE, indptr);
  };
  sparse("layers/column", {0, 3}, {0, 1, 2}, {2, 3});
  sparse("layers/falls", {0, 1}, {0, 2, 1}, {2, 3});
  sparse("layers/beyond", {0, 1}, {0, 1, 3}, {2, 3});
  sparse("layers/short", {0, 1}, {0, 2}, {2, 3});
  sparse("layers/indices", {0, 1, 2}, {0, 1, 2}, {2, 3});
  sparse("layers/absurd", {0, 1}, {0, 1, 2}, {2, int64_t{1} << 62});
  sparse("layers/negative", {0, 1}, {0, 1, 2}, {2, -3});
  sparse("layers/no_shape", {0, 1}, {0, 1, 2}, {2});
  const auto file = OpenOrDie(build.Done());
  std::vector<float> out(6);
  const auto read = [&](const std::string& key) -> absl::StatusOr<bool> {
    const auto matrix = file->OpenMatrix(key);
    if (!matrix.ok()) return matrix.status();
    const absl::Status status = (*matrix)->ReadRows(0, 2, out.data());
    if (!status.ok()) return status;
    return true;
  };
  EXPECT_THAT(MessageOf(read("layers/column")), HasSubstr("indices: found 3 at 1, wanted 0 to below 3"));
  EXPECT_THAT(MessageOf(read("layers/falls")), HasSubstr("indptr: does not rise"));
  EXPECT_THAT(MessageOf(read("layers/beyond")), HasSubstr("indptr: does not rise"));
  EXPECT_THAT(MessageOf(read("layers/short")), HasSubstr("found 2 entries in indptr"));
  EXPECT_THAT(MessageOf(read("layers/indices")), HasSubstr("3 in indices and 2 in data"));
  EXPECT_THAT(MessageOf(read("layers/absurd")), HasSubstr("found shape"));
  EXPECT_THAT(MessageOf(read("layers/negative")), HasSubstr("found shape"));
  EXPECT_THAT(MessageOf(read("layers/no_shape")), HasSubstr("found no attribute 'shape' of 2 integers"));
}

TEST(H5ad, FilesThatAreNotWholeAreRefused) {
  EXPECT_EQ(H5adFile::Open("/nonexistent/a.h5ad").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(MessageOf(H5adFile::Open("/")), HasSubstr("wanted an .h5ad file"));
  const std::string text = TempPath("text");
  std::ofstream(text) << "cell,label\n";
  EXPECT_THAT(MessageOf(H5adFile::Open(text)), HasSubstr("not an HDF5 file (11 bytes"));

  H5adBuilder build("truncated");
  build.Cells({"a", "b"});
  build.Numbers<float>("X", {2, 1000}, H5T_IEEE_F32LE, std::vector<float>(2000, 1.0f));
  const std::string path = build.Done();
  const auto whole = static_cast<int64_t>(std::filesystem::file_size(path));
  for (const int64_t bytes : {whole - 1, whole / 2, int64_t{600}}) {
    std::filesystem::resize_file(path, static_cast<uintmax_t>(bytes));
    EXPECT_THAT(MessageOf(H5adFile::Open(path)),
                AllOf(HasSubstr("truncated or broken"), HasSubstr("HDF5: ")));
  }
}

TEST(H5ad, AnArrayThatWasNeverWrittenIsRefused) {
  // HDF5 would answer with zeros: 2^30 cells out of a file of a few kilobytes.
  H5adBuilder build("holes");
  const hsize_t size = hsize_t{1} << 30;
  build.Group("obs");
  const hid_t space = H5Screate_simple(1, &size, nullptr);
  H5Dclose(
      H5Dcreate2(build.file(), "obs/_index", H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  H5Sclose(space);
  EXPECT_THAT(MessageOf(H5adFile::Open(build.Done())),
              HasSubstr("found only a part of its 1073741824 elements"));
}

TEST(H5ad, AFilterThatIsNotInstalledIsNamed) {
  H5adBuilder build("filter");
  build.Cells({"a"});
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {1, 1};
  H5Pset_chunk(plist, 2, chunk);
  H5Pset_filter(plist, 32015, H5Z_FLAG_OPTIONAL, 0,
                nullptr);  // Optional: it can be written, unfiltered, without it.
  build.Numbers<float>("X", {1, 1}, H5T_IEEE_F32LE, {1}, plist);
  H5Pclose(plist);
  EXPECT_THAT(MessageOf(OpenOrDie(build.Done())->OpenMatrix("X")),
              AllOf(HasSubstr("HDF5 filter 32015 (Zstandard)"), HasSubstr("write the file again")));
}

// Bytes as zlib packs them.
std::vector<unsigned char> Deflated(const std::vector<unsigned char>& bytes) {
  uLongf size = compressBound(bytes.size());
  std::vector<unsigned char> out(size);
  EXPECT_EQ(compress(out.data(), &size, bytes.data(), bytes.size()), Z_OK);
  out.resize(size);
  return out;
}

// A file with X of 3 x 4 floats in chunks of 2 x 4, 32 bytes, whose `filters` are in this order. The chunk of
// row 0 is `chunk` as it stands, as if the filters whose bits are in `skipped` had not been applied; that of
// row 2 is written by HDF5.
std::string FileWithChunk(const std::vector<H5Z_filter_t>& filters, const std::vector<unsigned char>& chunk,
                          uint32_t skipped = 0) {
  H5adBuilder build("chunk");
  build.Cells({"a", "b", "c"});
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk_size[2] = {2, 4};
  H5Pset_chunk(plist, 2, chunk_size);
  for (const H5Z_filter_t filter : filters) {
    const unsigned parameters[6] = {6, 0, 0, 0, 0, 0};
    H5Pset_filter(plist, filter, H5Z_FLAG_OPTIONAL, filter == H5Z_FILTER_DEFLATE ? 1 : 0, parameters);
  }
  const hsize_t size[2] = {3, 4};
  const hid_t space = H5Screate_simple(2, size, nullptr);
  const hid_t set = H5Dcreate2(build.file(), "X", H5T_IEEE_F32LE, space, H5P_DEFAULT, plist, H5P_DEFAULT);
  const std::vector<float> ones(12, 1.0f);
  EXPECT_GE(H5Dwrite(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, ones.data()), 0);
  const hsize_t origin[2] = {0, 0};
  EXPECT_GE(H5Dwrite_chunk(set, H5P_DEFAULT, skipped, origin, chunk.size(), chunk.data()), 0);
  H5Dclose(set);
  H5Sclose(space);
  H5Pclose(plist);
  return build.Done();
}

TEST(H5ad, ChunksThatUnpackToAnotherSizeThanTheirShapesAreRefused) {
  const std::vector<unsigned char> zeros(32, 0);
  const std::vector<unsigned char> whole = Deflated(zeros);
  std::vector<unsigned char> cut = whole;
  cut.resize(cut.size() - 5);
  struct Case {
    const char* what;
    std::vector<H5Z_filter_t> filters;
    std::vector<unsigned char> chunk;
    uint32_t skipped = 0;
    bool right = false;
  };
  const Case cases[] = {
      {"right", {H5Z_FILTER_DEFLATE}, whole, 0, true},
      {"a bomb of 4 MiB", {H5Z_FILTER_DEFLATE}, Deflated(std::vector<unsigned char>(size_t{1} << 22, 0))},
      {"a byte more", {H5Z_FILTER_DEFLATE}, Deflated(std::vector<unsigned char>(33, 0))},
      {"a byte less", {H5Z_FILTER_DEFLATE}, Deflated(std::vector<unsigned char>(31, 0))},
      {"cut", {H5Z_FILTER_DEFLATE}, cut},
      {"shuffled", {H5Z_FILTER_SHUFFLE, H5Z_FILTER_DEFLATE}, whole, 0, true},
      {"a shuffled bomb",
       {H5Z_FILTER_SHUFFLE, H5Z_FILTER_DEFLATE},
       Deflated(std::vector<unsigned char>(1000000, 0))},
      {"not packed", {H5Z_FILTER_DEFLATE}, zeros, 1, true},
      {"not packed, and short", {H5Z_FILTER_DEFLATE}, whole, 1},
      {"shuffled only, and short", {H5Z_FILTER_SHUFFLE}, std::vector<unsigned char>(31, 0)},
      {"as large as nothing packed could be", {H5Z_FILTER_DEFLATE}, std::vector<unsigned char>(10000, 0)},
      {"without its checksum", {H5Z_FILTER_FLETCHER32}, zeros},
      {"lzf of 4 bytes", {32000}, {0x00, 7, 0x20, 0x00}},
      {"lzf of 33 bytes", {32000}, {0x00, 7, 0xe0, 23, 0x00}},
  };
  for (const Case& test : cases) {
    if (!test.filters.empty() && test.filters[0] == 32000) H5Zunregister(32000);  // Ours cannot write.
    const auto matrix = OpenOrDie(FileWithChunk(test.filters, test.chunk, test.skipped))->OpenMatrix("X");
    ASSERT_TRUE(matrix.ok()) << test.what << ": " << matrix.status();
    std::vector<float> rows(12, -1.0f);
    const absl::Status status = (*matrix)->ReadRows(0, 2, rows.data());
    if (test.right) {
      EXPECT_TRUE(status.ok()) << test.what << ": " << status;
      EXPECT_EQ(rows[7], 0) << test.what;
    } else {
      EXPECT_THAT(std::string(status.message()),
                  AllOf(HasSubstr("X: found a chunk"), HasSubstr("the file is broken")))
          << test.what;
    }
    EXPECT_TRUE((*matrix)->ReadRows(2, 1, rows.data()).ok()) << test.what;
  }
}

TEST(H5ad, PipelinesThatCannotBeCheckedAreRefused) {
  const std::vector<std::vector<H5Z_filter_t>> pipelines = {
      {H5Z_FILTER_DEFLATE, H5Z_FILTER_DEFLATE},
      {H5Z_FILTER_DEFLATE, H5Z_FILTER_SHUFFLE},
      {H5Z_FILTER_FLETCHER32, H5Z_FILTER_DEFLATE},
      {H5Z_FILTER_SCALEOFFSET},
  };
  for (const auto& filters : pipelines) {
    EXPECT_THAT(
        MessageOf(OpenOrDie(FileWithChunk(filters, std::vector<unsigned char>(32, 0)))->OpenMatrix("X")),
        AllOf(HasSubstr("X: found HDF5 filter"), HasSubstr("compression='gzip'")));
  }
}

TEST(H5ad, ChunksTooLargeForMemoryAreRefused) {
  H5adBuilder build("large_chunk");
  build.Cells({"a"});
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk[2] = {hsize_t{1} << 20, 65};
  H5Pset_chunk(plist, 2, chunk);
  const hsize_t size[2] = {1, 65};
  const hsize_t unlimited[2] = {H5S_UNLIMITED, 65};
  const hid_t space = H5Screate_simple(2, size, unlimited);
  const hid_t set = H5Dcreate2(build.file(), "X", H5T_IEEE_F32LE, space, H5P_DEFAULT, plist, H5P_DEFAULT);
  const hsize_t origin[2] = {0, 0};
  const char byte = 0;
  ASSERT_GE(H5Dwrite_chunk(set, H5P_DEFAULT, 0, origin, 1, &byte), 0);
  H5Dclose(set);
  H5Sclose(space);
  H5Pclose(plist);
  EXPECT_THAT(MessageOf(OpenOrDie(build.Done())->OpenMatrix("X")),
              HasSubstr("found chunks of 272629760 bytes"));
}

TEST(H5ad, ReadsPackedTextAndRecords) {
  // Their elements have other sizes in the file than in memory.
  H5adBuilder build("packed");
  build.Cells({"a", "b"});
  const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
  const hsize_t chunk = 2;
  H5Pset_chunk(plist, 1, &chunk);
  H5Pset_shuffle(plist);
  H5Pset_deflate(plist, 4);
  const hsize_t size = 2;
  const hid_t space = H5Screate_simple(1, &size, nullptr);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, H5T_VARIABLE);
  const char* words[2] = {"T cell", "B cell"};
  const hid_t set = H5Dcreate2(build.file(), "obs/kind", text, space, H5P_DEFAULT, plist, H5P_DEFAULT);
  ASSERT_GE(H5Dwrite(set, text, H5S_ALL, H5S_ALL, H5P_DEFAULT, static_cast<const void*>(words)), 0);
  H5Dclose(set);

  struct Record {
    const char* name;
    float vector[3];
  };
  const Record records[2] = {{"x", {1, 2, 3}}, {"y", {4, 5, 6}}};
  const hsize_t width = 3;
  const hid_t vector = H5Tarray_create2(H5T_NATIVE_FLOAT, 1, &width);
  const hid_t type = H5Tcreate(H5T_COMPOUND, sizeof(Record));
  H5Tinsert(type, "name", offsetof(Record, name), text);
  H5Tinsert(type, "X_pca", offsetof(Record, vector), vector);
  const hid_t table = H5Dcreate2(build.file(), "obsm", type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
  ASSERT_GE(H5Dwrite(table, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, records), 0);
  H5Dclose(table);
  H5Tclose(type);
  H5Tclose(vector);
  H5Tclose(text);
  H5Sclose(space);
  H5Pclose(plist);

  const auto file = OpenOrDie(build.Done());
  EXPECT_THAT(file->ReadLabels("obs/kind").value().names, ElementsAre("B cell", "T cell"));
  EXPECT_THAT(AllRows(*file->OpenMatrix("obsm/X_pca").value(), 2), ElementsAre(1, 2, 3, 4, 5, 6));
}

}  // namespace
}  // namespace eduba
