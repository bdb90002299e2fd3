#include "model/tokenizer/gene_vocabulary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace eduba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(GeneVocabulary, OneTokenIsOneGene) {
  const auto vocabulary = GeneVocabulary::Parse("<pad>\n[sOS]\nACTB\nMT-CO1\nHLA-DRA\n", "genes.txt");
  ASSERT_TRUE(vocabulary.ok()) << vocabulary.status();
  EXPECT_EQ((*vocabulary)->vocab_size(), 5);
  EXPECT_EQ((*vocabulary)->special_tokens(), 2);
  EXPECT_EQ((*vocabulary)->TokenId("[sOS]"), 1);
  EXPECT_EQ((*vocabulary)->TokenId("actb"), std::nullopt);
  const auto ids = (*vocabulary)->Encode("[sOS] MT-CO1\tACTB\n\nACTB  HLA-DRA ", {});
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_THAT(*ids, ElementsAre(1, 3, 2, 2, 4));
  EXPECT_EQ((*vocabulary)->Decode(*ids, {false}), "[sOS] MT-CO1 ACTB ACTB HLA-DRA");
  EXPECT_EQ((*vocabulary)->Decode(*ids, {true}), "MT-CO1 ACTB ACTB HLA-DRA");
  EXPECT_EQ((*vocabulary)->Decode({-1, 2, 99}, {}), "ACTB");
  EXPECT_TRUE((*vocabulary)->Encode("", {})->empty());
}

TEST(GeneVocabulary, AnUnknownGeneIsNamed) {
  const auto vocabulary = GeneVocabulary::Parse("ACTB\r\nGAPDH", "genes.txt");
  ASSERT_TRUE(vocabulary.ok());
  EXPECT_EQ((*vocabulary)->TokenId("GAPDH"), 1);
  const auto ids = (*vocabulary)->Encode("ACTB XYZ1 GAPDH", {});
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("word 1 of the text, \"XYZ1\""));
  EXPECT_FALSE((*vocabulary)->Encode("ACTB \xFF", {}).ok());
}

TEST(GeneVocabulary, ABadLineIsNamed) {
  const std::pair<std::string, std::string> cases[] = {
      {"A\n\nB\n", "line 2 is empty"},        {"", "line 1 is empty"},
      {"A\nB C\n", "line 2 has white space"}, {"A\nB\nA\n", "line 3 repeats \"A\""},
      {"A\n<eos>\n", "line 2 is a special"},  {"A\nB\xFF\n", "no valid UTF-8 at byte 3"},
      {"A\n\n", "line 2 is empty"},           {std::string(1000, 'x'), "line 1 is 1000 bytes long"}};
  for (const auto& [text, message] : cases) {
    const auto vocabulary = GeneVocabulary::Parse(text, "genes.txt");
    EXPECT_EQ(vocabulary.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(vocabulary.status().message()), HasSubstr(message));
  }
}

}  // namespace
}  // namespace eduba
