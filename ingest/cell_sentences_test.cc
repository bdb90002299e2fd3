#include "ingest/cell_sentences.h"

#include <hdf5.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "ingest/npy.h"
#include "ingest/testing/h5ad_builder.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Below what a float32 holds, and two that a float32 cannot tell apart.
constexpr double kTiny = 1e-60;
constexpr double kNextToOne = 1 + 1e-12;

enum class Layout { kDense, kCsr, kCsc };

// 3 cells x 5 genes.
const std::vector<double>& Expression() {
  static const auto* const values = new std::vector<double>{
      0, 2,          0, 7, 2,      //
      1, kNextToOne, 0, 0, kTiny,  //
      0, 0,          0, 0, 0,      //
  };
  return *values;
}

// Stores zeros, too, as some writers do, and each row's entries from the back.
void WriteMatrix(H5adBuilder& file, const std::string& name, Layout layout, const std::vector<double>& values,
                 int64_t cells, int64_t genes) {
  if (layout == Layout::kDense) {
    file.Numbers(name, {static_cast<hsize_t>(cells), static_cast<hsize_t>(genes)}, H5T_IEEE_F64LE, values);
    return;
  }
  const bool by_rows = layout == Layout::kCsr;
  const int64_t majors = by_rows ? cells : genes;
  const int64_t minors = by_rows ? genes : cells;
  std::vector<double> data;
  std::vector<int64_t> indices;
  std::vector<int64_t> starts = {0};
  for (int64_t major = 0; major < majors; ++major) {
    for (int64_t minor = minors; minor-- > 0;) {
      data.push_back(by_rows ? values[major * genes + minor] : values[minor * genes + major]);
      indices.push_back(minor);
    }
    starts.push_back(static_cast<int64_t>(data.size()));
  }
  file.Group(name);
  file.TextAttribute(name, "encoding-type", by_rows ? "csr_matrix" : "csc_matrix");
  file.IntegerAttribute(name, "shape", {cells, genes});
  file.Numbers(name + "/data", {data.size()}, H5T_IEEE_F64LE, data);
  file.Numbers(name + "/indices", {indices.size()}, H5T_STD_I32LE, indices);
  file.Numbers(name + "/indptr", {starts.size()}, H5T_STD_I64LE, starts);
}

void WriteGenes(H5adBuilder& file, const std::vector<std::string>& ids) {
  file.Group("var");
  file.Texts("var/ensembl_id", ids);
  file.TextAttribute("var", "_index", "ensembl_id");
}

std::string WriteAtlas(const std::string& name, Layout layout,
                       const std::vector<double>& values = Expression(),
                       const std::vector<std::string>& ids = {"E0", "E1", "E2", "E3", "E4"}) {
  H5adBuilder file(name);
  file.Cells({"a", "b", "c"});
  WriteGenes(file, ids);
  WriteMatrix(file, "X", layout, values, 3, 5);
  return file.Done();
}

std::unique_ptr<CellSentences> OpenOrDie(const std::string& path,
                                         const CellSentences::Options& options = {}) {
  auto cells = CellSentences::Open(path, options);
  EXPECT_TRUE(cells.ok()) << cells.status();
  return cells.ok() ? *std::move(cells) : nullptr;
}

std::string ErrorOf(const std::string& path, const CellSentences::Options& options = {}) {
  const auto cells = CellSentences::Open(path, options);
  absl::Status status = cells.status();
  if (status.ok()) status = (*cells)->Read(0, (*cells)->cells()).status();
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("\n")));
  return std::string(status.message());
}

TEST(CellSentences, GenesStandByExpressionAsStoredAndTiesInTheOrderOfVar) {
  for (const Layout layout : {Layout::kDense, Layout::kCsr, Layout::kCsc}) {
    const auto cells = OpenOrDie(WriteAtlas("atlas.h5ad", layout));
    ASSERT_NE(cells, nullptr);
    EXPECT_EQ(cells->cells(), 3);
    const auto sentences = cells->Read(0, 3);
    ASSERT_TRUE(sentences.ok()) << sentences.status();
    EXPECT_THAT((*sentences)[0], ElementsAre(3, 1, 4));
    EXPECT_THAT((*sentences)[1], ElementsAre(1, 0, 4));
    EXPECT_THAT((*sentences)[2], IsEmpty());
    EXPECT_THAT(cells->Read(1, 1)->front(), ElementsAre(1, 0, 4));
  }
}

TEST(CellSentences, CellsComeInTheOrderOfTheList) {
  const std::string path = WriteAtlas("atlas.h5ad", Layout::kCsr);
  CellSentences::Options options;
  options.rows = TempPath("rows.npy");
  const std::vector<int64_t> rows = {1, 0, 1};
  ASSERT_TRUE(WriteNpy(options.rows, {3}, absl::MakeConstSpan(rows)).ok());
  const auto cells = OpenOrDie(path, options);
  ASSERT_NE(cells, nullptr);
  const auto sentences = cells->Read(0, 3);
  ASSERT_TRUE(sentences.ok()) << sentences.status();
  EXPECT_THAT(*sentences, ElementsAre(ElementsAre(1, 0, 4), ElementsAre(3, 1, 4), ElementsAre(1, 0, 4)));
}

TEST(CellSentences, NamesAreTheFeatureNameOrWhatIsAskedForOrTheIndex) {
  EXPECT_EQ(OpenOrDie(WriteAtlas("plain.h5ad", Layout::kDense))->genes_from(), "the index of var");
  H5adBuilder file("named.h5ad");
  file.Cells({"a", "b", "c"});
  WriteGenes(file, {"E0", "E1", "E2", "E3", "E4"});
  // Categories, as CELLxGENE has them; one gene has no name.
  file.Group("var/feature_name");
  file.TextAttribute("var/feature_name", "encoding-type", "categorical");
  file.Numbers<int64_t>("var/feature_name/codes", {5}, H5T_STD_I8LE, {2, 1, 0, -1, 2});
  file.Texts("var/feature_name/categories", {"ACTB", "TP53", "MYOG"});
  file.Texts("var/symbol", {"s0", "s1", "s2", "s3", "s4"});
  WriteMatrix(file, "X", Layout::kCsr, Expression(), 3, 5);
  std::vector<double> twice = Expression();
  twice[0] = 9;
  file.Group("layers");
  WriteMatrix(file, "layers/counts", Layout::kCsr, twice, 3, 5);
  const std::string path = file.Done();

  const auto cells = OpenOrDie(path);
  EXPECT_EQ(cells->genes_from(), "var/feature_name");
  EXPECT_THAT(cells->genes(), ElementsAre("MYOG", "TP53", "ACTB", "", "MYOG"));
  EXPECT_THAT(cells->index(), ElementsAre("E0", "E1", "E2", "E3", "E4"));
  CellSentences::Options options;
  options.genes = "var/symbol";
  options.matrix = "layers/counts";
  const auto others = OpenOrDie(path, options);
  EXPECT_THAT(others->genes(), ElementsAre("s0", "s1", "s2", "s3", "s4"));
  EXPECT_THAT(others->Read(0, 1)->front(), ElementsAre(0, 3, 1, 4));
  options.genes = "var/none";
  EXPECT_THAT(ErrorOf(path, options), HasSubstr("column none"));
  options.genes = "symbol";
  EXPECT_THAT(ErrorOf(path, options), HasSubstr("wanted var/NAME"));
}

TEST(CellSentences, BadFilesGetOneLine) {
  for (const Layout layout : {Layout::kDense, Layout::kCsr, Layout::kCsc}) {
    std::vector<double> values = Expression();
    values[6] = -0.25;
    EXPECT_THAT(ErrorOf(WriteAtlas("negative.h5ad", layout, values)),
                HasSubstr("found -0.25 for cell 1 (counted from 0), gene E1"));
    values[6] = kNan;
    EXPECT_THAT(ErrorOf(WriteAtlas("nan.h5ad", layout, values)), HasSubstr("found nan for cell 1"));
  }
  EXPECT_THAT(ErrorOf(WriteAtlas("short.h5ad", Layout::kCsr, Expression(), {"E0", "E1"})),
              HasSubstr("found 5 columns, and 2 genes in the index of var"));
  H5adBuilder without("without_var.h5ad");
  without.Cells({"a", "b", "c"});
  WriteMatrix(without, "X", Layout::kCsr, Expression(), 3, 5);
  EXPECT_THAT(ErrorOf(without.Done()), HasSubstr("var (the table of genes)"));
  H5adBuilder nameless("nameless.h5ad");
  nameless.Cells({"a", "b", "c"});
  nameless.Group("var");
  WriteMatrix(nameless, "X", Layout::kCsr, Expression(), 3, 5);
  EXPECT_THAT(ErrorOf(nameless.Done()), HasSubstr("var/index"));
  H5adBuilder no_matrix("no_matrix.h5ad");
  no_matrix.Cells({"a"});
  WriteGenes(no_matrix, {"E0"});
  EXPECT_THAT(ErrorOf(no_matrix.Done()), HasSubstr("found no X"));

  const std::string whole = WriteAtlas("whole.h5ad", Layout::kCsr);
  std::ifstream in(whole, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  for (const size_t size : {size_t{0}, size_t{100}, bytes.size() / 2, bytes.size() - 1}) {
    const std::string path = TempPath("truncated.h5ad");
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(size));
    EXPECT_THAT(ErrorOf(path), HasSubstr("truncated.h5ad"));
  }
}

}  // namespace
}  // namespace eduba
