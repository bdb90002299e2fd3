#include "atlas/atlas.h"

#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// `count` cells in `dims` dimensions around `middle`.
std::vector<float> Cloud(std::mt19937& random, int64_t count, int64_t dims, float middle, float width) {
  std::normal_distribution<float> normal(middle, width);
  std::vector<float> out(static_cast<size_t>(count * dims));
  for (float& value : out) value = normal(random);
  return out;
}

Atlas SmallAtlas(DType dtype, int64_t dims) {
  Atlas atlas;
  atlas.key = "obsm/X_pca";
  atlas.label_column = "obs/kind";
  atlas.labels = {"B", "T"};
  atlas.dtype = dtype;
  atlas.sigma = 3.2;
  atlas.sink_distance = 14.6;
  for (int64_t i = 0; i < dims; ++i) atlas.centre.push_back(0.37f * static_cast<float>(i) - 2);
  return atlas;
}

TEST(Atlas, TheDotProductIsTheGaussianExponent) {
  const int64_t dims = 50;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const Atlas atlas = SmallAtlas(dtype, dims);
    std::mt19937 random(7);
    const int64_t count = 40;
    const std::vector<float> cells = Cloud(random, count, dims, 1, 5);
    const std::vector<float> asked = Cloud(random, count, dims, 1, 5);
    std::vector<float> keys(static_cast<size_t>(count * atlas.head_dim()));
    std::vector<float> queries(keys.size());
    ASSERT_TRUE(EncodeKeys(atlas, cells, 0, absl::MakeSpan(keys)).ok());
    EncodeQueries(atlas, asked, absl::MakeSpan(queries));
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        const float* key = &keys[static_cast<size_t>(i * atlas.head_dim())];
        const float* query = &queries[static_cast<size_t>(j * atlas.head_dim())];
        double logit = 0;
        for (int64_t c = 0; c < atlas.head_dim(); ++c) logit += double{key[c]} * double{query[c]};
        // The distance to the stored cell, from the query as it was.
        double squared = 0;
        for (int64_t c = 0; c < dims; ++c) {
          const double d = double{asked[static_cast<size_t>(j * dims + c)]} -
                           double{atlas.centre[static_cast<size_t>(c)]} - double{key[c]};
          squared += d * d;
        }
        EXPECT_NEAR(logit, -squared / (2 * atlas.sigma * atlas.sigma), 3e-5)
            << DTypeName(dtype) << " " << i << " " << j;
      }
    }
  }
}

TEST(Atlas, EveryColumnOfAKeyIsExactInItsDType) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const Atlas atlas = SmallAtlas(dtype, 3);
    std::mt19937 random(8);
    const std::vector<float> cells = Cloud(random, 100, 3, -4, 9);
    std::vector<float> keys(100 * 7);
    ASSERT_TRUE(EncodeKeys(atlas, cells, 0, absl::MakeSpan(keys)).ok());
    for (size_t i = 0; i < keys.size(); ++i) {
      float stored = 0;
      StoreElement(&stored, dtype, 0, keys[i]);
      ASSERT_EQ(LoadElement(&stored, dtype, 0), keys[i]) << i;
    }
    for (size_t i = 0; i < 100; ++i) {
      const float* key = &keys[i * 7];
      const double half = (double{key[0]} * key[0] + double{key[1]} * key[1] + double{key[2]} * key[2]) / 2;
      EXPECT_NEAR(double{key[3]} + key[4] + key[5], -half, half * 0x1p-24) << DTypeName(dtype);
      EXPECT_EQ(key[6], 1);
    }
  }
}

TEST(Atlas, CellsBeyondTheDTypeAreNamed) {
  const Atlas atlas = SmallAtlas(DType::kF16, 2);
  std::vector<float> keys(12);
  const absl::Status status = EncodeKeys(atlas, {1, 1, 500, 1}, 10, absl::MakeSpan(keys));
  EXPECT_THAT(std::string(status.message()), HasSubstr("cell 11 is too large for f16; use --dtype f32"));
}

TEST(Atlas, OneHotValues) {
  const Atlas atlas = SmallAtlas(DType::kBf16, 2);
  std::vector<float> values(6, 9.0f);
  EncodeValues(atlas, {1, 0, 1}, absl::MakeSpan(values));
  EXPECT_THAT(values, ElementsAre(0, 1, 1, 0, 0, 1));
}

TEST(FitAtlas, AWidthThatTellsTheTypesApart) {
  std::mt19937 random(9);
  std::vector<float> cells = Cloud(random, 60, 5, 0, 1);
  const std::vector<float> others = Cloud(random, 60, 5, 4, 1);
  cells.insert(cells.end(), others.begin(), others.end());
  std::vector<int32_t> codes(120, 0);
  std::fill(codes.begin() + 60, codes.end(), 1);
  Atlas atlas = SmallAtlas(DType::kBf16, 0);
  const auto fitted = FitAtlas(atlas, cells, codes);
  ASSERT_TRUE(fitted.ok()) << fitted.status();
  EXPECT_EQ(fitted->dims(), 5);
  for (const float middle : fitted->centre) EXPECT_NEAR(middle, 2, 0.3);
  // The clouds are 9 apart and neighbours about 1: any sensible width lies between.
  EXPECT_GT(fitted->sigma, 0.1);
  EXPECT_LT(fitted->sigma, 3);
  EXPECT_GT(fitted->sink_distance, 1);
  EXPECT_LT(fitted->sink_distance, 5);
  // The same again, and in units a thousand times larger.
  const auto again = FitAtlas(atlas, cells, codes);
  EXPECT_EQ(again->sigma, fitted->sigma);
  for (float& value : cells) value *= 1024;
  const auto scaled = FitAtlas(atlas, cells, codes);
  EXPECT_NEAR(scaled->sigma / fitted->sigma, 1024, 1e-3);
  EXPECT_NEAR(scaled->sink_distance / fitted->sink_distance, 1024, 1e-3);
}

// Labels that change from cell to cell along a line want a narrow kernel, labels that are the same far around
// a wide one will do.
TEST(FitAtlas, FinerLabelsGetANarrowerWidth) {
  std::vector<float> cells;
  std::vector<int32_t> fine;
  std::vector<int32_t> coarse;
  std::mt19937 random(10);
  std::uniform_real_distribution<float> jitter(-0.4f, 0.4f);
  for (int i = 0; i < 200; ++i) {
    cells.push_back(static_cast<float>(i) + jitter(random));
    fine.push_back(i / 3 % 2);
    coarse.push_back(i / 100);
  }
  const Atlas atlas = SmallAtlas(DType::kF32, 0);
  EXPECT_LT(FitAtlas(atlas, cells, fine)->sigma, FitAtlas(atlas, cells, coarse)->sigma);
}

TEST(FitAtlas, DegenerateReferencesAreNamedOrSurvived) {
  const Atlas atlas = SmallAtlas(DType::kBf16, 0);
  EXPECT_THAT(std::string(FitAtlas(atlas, {1, 2}, {0}).status().message()),
              HasSubstr("found 1 reference cells"));
  EXPECT_THAT(std::string(FitAtlas(atlas, {1, 2, 1, 2}, {0, 1}).status().message()),
              HasSubstr("all the same"));
  EXPECT_THAT(std::string(FitAtlas(atlas, std::vector<float>(2 * 1021), {0, 1}).status().message()),
              HasSubstr("found cells of 1021 numbers, wanted 1 to 1020"));
  EXPECT_THAT(std::string(FitAtlas(atlas, {1e-30f, 2e-30f, 3e-30f}, {0, 1, 0}).status().message()),
              HasSubstr("beyond what f32 can weigh"));
  // Two cells, each there twice: the distance that is there decides.
  const auto pairs = FitAtlas(atlas, {0, 0, 8, 8}, {0, 0, 1, 1});
  ASSERT_TRUE(pairs.ok()) << pairs.status();
  EXPECT_EQ(pairs->sink_distance, 8);
  // One label: every width explains it.
  const auto single = FitAtlas(atlas, {0, 1, 2, 3}, {0, 0, 0, 0});
  ASSERT_TRUE(single.ok()) << single.status();
  EXPECT_NEAR(single->sigma, 0.42, 0.01);
}

TEST(FitAtlas, RoundingIsMeasuredInSigmas) {
  Atlas atlas = SmallAtlas(DType::kBf16, 1);
  atlas.centre = {0};
  atlas.sigma = 0.5;
  // 257 is not in bf16 (256 is); 1 is.
  EXPECT_NEAR(RoundingInSigmas(atlas, {257, 1}), std::sqrt(0.5) / 0.5, 1e-12);
  atlas.dtype = DType::kF32;
  EXPECT_EQ(RoundingInSigmas(atlas, {257, 1}), 0);
}

TEST(SampleIndices, AreEvenlySpaced) {
  EXPECT_THAT(SampleIndices(3), ElementsAre(0, 1, 2));
  EXPECT_TRUE(SampleIndices(0).empty());
  const std::vector<int64_t> sample = SampleIndices(1000000);
  ASSERT_EQ(sample.size(), 2000);
  EXPECT_EQ(sample[1], 500);
  EXPECT_EQ(sample.back(), 999500);
}

TEST(ReferenceLabels, KeepsWhatTheRowsUse) {
  AtlasLabels labels;
  labels.names = {"B", "unused", "T"};
  labels.codes = {2, 0, -1, 1, 2};
  const auto all = ReferenceLabels(labels.names, labels.codes, {4, 2, 1});
  ASSERT_TRUE(all.ok());
  EXPECT_THAT(all->names, ElementsAre("B", "T", kUnlabelled));
  EXPECT_THAT(all->codes, ElementsAre(1, 2, 0));
  // A file that has the label of the unlabelled already.
  labels.names[1] = kUnlabelled;
  const auto merged = ReferenceLabels(labels.names, labels.codes, {2, 3, 0});
  EXPECT_THAT(merged->names, ElementsAre(kUnlabelled, "T"));
  EXPECT_THAT(merged->codes, ElementsAre(0, 0, 1));
}

TEST(ReferenceLabels, CellsThatAllLackLabelsAreRefused) {
  AtlasLabels labels;
  labels.names = {"B"};
  labels.codes = {-1, 0, -1};
  EXPECT_THAT(std::string(ReferenceLabels(labels.names, labels.codes, {0, 2}).status().message()),
              HasSubstr("found no label on any of the 2 cells"));
  EXPECT_TRUE(ReferenceLabels(labels.names, labels.codes, {0, 1}).ok());
}

TEST(ReferenceLabels, TooManyAreRefused) {
  AtlasLabels labels;
  std::vector<int64_t> rows;
  for (int i = 0; i < 1025; ++i) {
    labels.names.push_back(absl::StrCat(i));
    labels.codes.push_back(i);
    rows.push_back(i);
  }
  EXPECT_THAT(std::string(ReferenceLabels(labels.names, labels.codes, rows).status().message()),
              HasSubstr("found 1025 different labels, wanted at most 1024"));
  rows.pop_back();
  EXPECT_TRUE(ReferenceLabels(labels.names, labels.codes, rows).ok());
}

TEST(CallCell, TheLikeliestLabelAndTheNext) {
  const CellCall call = CallCell({0.1f, 0.3f, 0.0f, 0.2f}, 0.4f);
  EXPECT_EQ(call.label, 1);
  EXPECT_NEAR(call.probability, 0.5, 1e-6);
  EXPECT_EQ(call.second, 3);
  EXPECT_NEAR(call.second_probability, 1.0 / 3, 1e-6);
  EXPECT_FLOAT_EQ(static_cast<float>(call.novelty), 0.4f);
}

TEST(CallCell, TheFirstOfEqualsAndTheEdges) {
  EXPECT_EQ(CallCell({0.25f, 0.5f, 0.5f}, 0).label, 1);
  EXPECT_EQ(CallCell({0.25f, 0.5f, 0.5f}, 0).second, 2);
  EXPECT_EQ(CallCell({1}, 0).second, -1);
  EXPECT_EQ(CallCell({1}, 0).probability, 1);
  const CellCall nothing = CallCell({0, 0}, 1);
  EXPECT_EQ(nothing.label, -1);
  EXPECT_EQ(nothing.probability, 0);
  EXPECT_EQ(nothing.novelty, 1);
  // Almost all of the weight is the sink's: what is left still has its shares.
  EXPECT_NEAR(CallCell({3e-30f, 1e-30f}, 1).probability, 0.75, 1e-6);
}

TEST(AtlasJson, ComesBackWhole) {
  Atlas atlas = SmallAtlas(DType::kF16, 7);
  atlas.labels = {"CD4+/CD25 T Reg", "β-cell, \"odd\"\n"};
  atlas.sigma = 1.0 / 3;
  const auto back = AtlasFromJson(AtlasToJson(atlas));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->key, atlas.key);
  EXPECT_EQ(back->label_column, atlas.label_column);
  EXPECT_EQ(back->labels, atlas.labels);
  EXPECT_EQ(back->centre, atlas.centre);
  EXPECT_EQ(back->dtype, atlas.dtype);
  EXPECT_EQ(back->sigma, atlas.sigma);
  EXPECT_EQ(back->sink_distance, atlas.sink_distance);
}

TEST(AtlasJson, LabelsThatAreNotUtf8BecomeReadable) {
  Atlas atlas = SmallAtlas(DType::kF16, 7);
  atlas.labels = {"\xff"};
  EXPECT_EQ(AtlasFromJson(AtlasToJson(atlas))->labels[0], "\xef\xbf\xbd");
}

TEST(AtlasJson, OtherNotesAreRefused) {
  const std::string good = AtlasToJson(SmallAtlas(DType::kBf16, 2));
  ASSERT_TRUE(AtlasFromJson(good).ok());
  for (const std::string notes : {"", "hello", "[]", "null", "{}", "{\"format\":1}"}) {
    EXPECT_EQ(AtlasFromJson(notes).status().code(), absl::StatusCode::kInvalidArgument) << notes;
  }
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return AtlasFromJson(text.replace(at, from.size(), to));
  };
  EXPECT_FALSE(with("\"version\":1", "\"version\":2").ok());
  EXPECT_FALSE(with("\"sigma\":3.2", "\"sigma\":0").ok());
  EXPECT_FALSE(with("\"sigma\":3.2", "\"sigma\":-1").ok());
  EXPECT_FALSE(with("\"sigma\":3.2", "\"sigma\":1e-200").ok());
  EXPECT_FALSE(with("\"sigma\":3.2", "\"sigma\":1e200").ok());
  EXPECT_FALSE(with("\"sigma\":3.2", "\"sigma\":\"3\"").ok());
  EXPECT_FALSE(with("\"sink_distance\":14.6", "\"sink_distance\":1e300").ok());
  EXPECT_FALSE(with("\"dtype\":\"bf16\"", "\"dtype\":\"f8\"").ok());
  EXPECT_FALSE(with("[\"B\",\"T\"]", "[]").ok());
  EXPECT_FALSE(with("[\"B\",\"T\"]", "[1]").ok());
  EXPECT_FALSE(with("\"centre\":[", "\"centre\":[1e300,").ok());
  EXPECT_FALSE(with("\"centre\":[", "\"centre\":[null,").ok());
  EXPECT_FALSE(with("}", "").ok());
}

TEST(Calls, AreCsv) {
  Atlas atlas = SmallAtlas(DType::kBf16, 2);
  atlas.labels = {"a,b", "say \"x\""};
  CellCall call = CallCell({0.5f, 0.25f}, 0.25f);
  EXPECT_EQ(CallsHeader(), "cell,label,probability,second_label,second_probability,novelty\n");
  EXPECT_EQ(CallsLine(atlas, "AAAC-1", call),
            "AAAC-1,\"a,b\",0.666666667,\"say \"\"x\"\"\",0.333333333,0.25\n");
  EXPECT_EQ(CallsLine(atlas, "line\nbreak", CallCell({0, 0}, 1)), "\"line\nbreak\",,0,,0,1\n");
}

}  // namespace
}  // namespace eduba
