// What a tokenizer.json may and may not be. That it means what the original says is golden_test.cc's.
#include "model/tokenizer/json_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

// Merges a+b, ab+c; one added token.
json Tiny() {
  return json::parse(R"({"version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [{"id": 5, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
              "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
              "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": [["a", "b"], ["ab", "c"]]}})");
}

json With(json file, const std::string& pointer, const json& value) {
  file[json::json_pointer(pointer)] = value;
  return file;
}

std::string ErrorOf(const json& file) {
  const auto tokenizer = JsonTokenizer::Parse(file.dump(), "tokenizer.json");
  if (tokenizer.ok()) return "OK";
  EXPECT_FALSE(absl::StrContains(tokenizer.status().message(), '\n')) << tokenizer.status();
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr("tokenizer.json"));
  return tokenizer.status().ToString();
}

TEST(JsonTokenizer, MergesAndPutsTheTemplateAround) {
  const auto tokenizer = JsonTokenizer::Parse(Tiny().dump(), "tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 6);
  EXPECT_THAT(*(*tokenizer)->Encode("abcab<s>c", {}), ElementsAre(5, 4, 3, 5, 2));
  EXPECT_THAT(*(*tokenizer)->Encode("abc", {false}), ElementsAre(4));
  EXPECT_EQ((*tokenizer)->TokenId("<s>"), 5);
  EXPECT_EQ((*tokenizer)->TokenId("abc"), 4);
  EXPECT_EQ((*tokenizer)->Encode("a\xFF", {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(JsonTokenizer, OldMergesOfTextsMeanTheSame) {
  json file = With(Tiny(), "/model/merges", {"#version: 0.2", "a b", "ab c"});
  const auto tokenizer = JsonTokenizer::Parse(file.dump(), "tokenizer.json");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT(*(*tokenizer)->Encode("abcab", {false}), ElementsAre(4, 3));
}

TEST(JsonTokenizer, ComponentsThatAreNotSupportedAreRefusedByName) {
  for (const auto& [pointer, type] :
       std::vector<std::pair<std::string, std::string>>{{"/normalizer", "NFKC"},
                                                        {"/normalizer", "Lowercase"},
                                                        {"/normalizer", "Precompiled"},
                                                        {"/normalizer", "NFD"},
                                                        {"/pre_tokenizer", "Whitespace"},
                                                        {"/pre_tokenizer", "Digits"},
                                                        {"/pre_tokenizer", "Punctuation"},
                                                        {"/post_processor", "BertProcessing"},
                                                        {"/post_processor", "RobertaProcessing"},
                                                        {"/decoder", "WordPiece"},
                                                        {"/decoder", "Metaspace"},
                                                        {"/model", "WordPiece"},
                                                        {"/model", "Unigram"},
                                                        {"/model", "WordLevel"}}) {
    EXPECT_THAT(ErrorOf(With(Tiny(), pointer, {{"type", type}})),
                testing::AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr(pointer.substr(1)),
                               HasSubstr(absl::StrCat("\"", type, "\""))));
  }
  EXPECT_THAT(ErrorOf(With(Tiny(), "/decoder", nullptr)), HasSubstr("decoder of type null"));
  EXPECT_THAT(ErrorOf(With(Tiny(), "/model", nullptr)), HasSubstr("model of type null"));
}

TEST(JsonTokenizer, FieldsThatAreNotSupportedAreRefusedByName) {
  for (const auto& [pointer, value] :
       std::vector<std::pair<std::string, json>>{{"/model/dropout", 0.1},
                                                 {"/model/continuing_subword_prefix", "##"},
                                                 {"/model/end_of_word_suffix", "</w>"},
                                                 {"/model/new_field", false},
                                                 {"/new_field", nullptr},
                                                 {"/version", "2.0"},
                                                 {"/pre_tokenizer/new_field", 1},
                                                 {"/added_tokens/0/single_word", true},
                                                 {"/added_tokens/0/new_field", 1},
                                                 {"/decoder/new_field", 1},
                                                 {"/post_processor/new_field", 1}}) {
    EXPECT_THAT(
        ErrorOf(With(Tiny(), pointer, value)),
        testing::AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr(pointer.substr(pointer.rfind('/') + 1))));
  }
  EXPECT_THAT(ErrorOf(With(Tiny(), "/normalizer",
                           {{"type", "Replace"}, {"pattern", {{"Regex", "a"}}}, {"content", ""}})),
              HasSubstr("pattern"));
  EXPECT_THAT(
      ErrorOf(With(
          Tiny(), "/pre_tokenizer",
          {{"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Removed"}, {"invert", false}})),
      HasSubstr("Removed"));
  EXPECT_THAT(
      ErrorOf(With(
          Tiny(), "/pre_tokenizer",
          {{"type", "Split"}, {"pattern", {{"Regex", "\\w"}}}, {"behavior", "Isolated"}, {"invert", false}})),
      HasSubstr("\\w"));
  EXPECT_THAT(
      ErrorOf(With(Tiny(), "/decoder",
                   {{"type", "Sequence"},
                    {"decoders", {{{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}})),
      HasSubstr("Strip without Fuse"));
  const json byte_level = Tiny()["pre_tokenizer"];
  EXPECT_THAT(ErrorOf(With(Tiny(), "/pre_tokenizer",
                           {{"type", "Sequence"}, {"pretokenizers", {byte_level, byte_level}}})),
              HasSubstr("as the last step only"));
}

TEST(JsonTokenizer, FilesThatContradictThemselvesAreRefused) {
  for (const auto& [pointer, value, message] : std::vector<std::tuple<std::string, json, std::string>>{
           {"/model/vocab/abc", 3, "have the same id 3"},
           {"/model/vocab/abc", -1, "has the id -1"},
           {"/model/vocab/abc", 1e9, "has the id"},
           {"/model/vocab/abc", 4000000000, "has the id 4000000000"},
           {"/model/vocab", json::array(), "vocab is no object"},
           {"/model/merges/0", {"a", "x"}, "merge 0"},
           {"/model/merges/1", {"a", "c"}, "merge 1"},
           {"/model/merges/1", "ab  c", "merge 1"},
           {"/model/merges", json::object(), "merges is no list"},
           {"/model/unk_token", "<unk>", "unk_token"},
           {"/model/fuse_unk", 1, "fuse_unk"},
           {"/added_tokens/0/id", 7, "id = 7, wanted 5"},
           {"/added_tokens/0/content", "", "content"},
           {"/added_tokens/0", 3, "added_tokens has 3"},
           {"/added_tokens/1", {{"id", 6}, {"content", "<s>"}}, "\"<s>\" twice"},
           {"/post_processor/single", json::array(), "one text"},
           {"/post_processor/single/0/SpecialToken/id", "<x>", "single"},
           {"/post_processor/special_tokens/<s>/ids/0", 6, "ids below 6"},
       }) {
    EXPECT_THAT(ErrorOf(With(Tiny(), pointer, value)), HasSubstr(message)) << pointer;
  }
  EXPECT_THAT(ErrorOf(json::array()), HasSubstr("no JSON object"));
}

TEST(JsonTokenizer, EveryTruncationIsAnError) {
  const std::string text = Tiny().dump();
  for (size_t bytes = 0; bytes < text.size(); ++bytes) {
    EXPECT_FALSE(JsonTokenizer::Parse(text.substr(0, bytes), "tokenizer.json").ok()) << bytes;
  }
}

class TokenizerFolder : public testing::Test {
 protected:
  TokenizerFolder() : folder_(testing::TempDir() + absl::StrCat("tokenizer_test_", getpid())) {
    std::filesystem::create_directories(folder_);
  }
  ~TokenizerFolder() override { std::filesystem::remove_all(folder_); }
  void Copy(const std::string& from, const std::string& to) {
    std::filesystem::copy_file(absl::StrCat(EDUBA_TESTDATA, "/", from), folder_ + "/" + to);
  }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ + "/" + name) << text;
  }
  const std::string folder_;
};

TEST_F(TokenizerFolder, TheFirstOfItsThreeFilesCounts) {
  EXPECT_EQ(LoadTokenizer(folder_).status().code(), absl::StatusCode::kNotFound);
  Write("genes.txt", "ACTB\n");
  EXPECT_EQ((*LoadTokenizer(folder_))->vocab_size(), 1);
  Copy("spm_bpe.model", "tokenizer.model");
  EXPECT_GT((*LoadTokenizer(folder_))->vocab_size(), 300);
  Write("tokenizer.json", Tiny().dump());
  EXPECT_EQ((*LoadTokenizer(folder_))->vocab_size(), 6);
  Write("tokenizer.json", "{");
  EXPECT_EQ(LoadTokenizer(folder_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(TokenizerFolder, TheTokensAroundASentencePieceTextAreConfiguredBesideIt) {
  Copy("spm_bpe.model", "tokenizer.model");
  const auto ends = [&] {
    const auto tokenizer = LoadTokenizer(folder_);
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    const auto ids = *(*tokenizer)->Encode("the cell", {});
    return std::pair{ids.front() == (*tokenizer)->TokenId("<s>"),
                     ids.back() == (*tokenizer)->TokenId("</s>")};
  };
  EXPECT_EQ(ends(), (std::pair{true, false}));
  Write("tokenizer_config.json", R"({"add_bos_token": false, "add_eos_token": true, "chat_template": "x"})");
  EXPECT_EQ(ends(), (std::pair{false, true}));
  Write("tokenizer_config.json", R"({"add_bos_token": "no"})");
  EXPECT_THAT(LoadTokenizer(folder_).status().ToString(), HasSubstr("add_bos_token = \"no\""));
  Write("tokenizer.model", "no model");
  EXPECT_THAT(LoadTokenizer(folder_).status().ToString(), HasSubstr("add_bos_token"));
  std::filesystem::remove(folder_ + "/tokenizer_config.json");
  EXPECT_THAT(LoadTokenizer(folder_).status().ToString(), HasSubstr("not a SentencePiece model"));
}

}  // namespace
}  // namespace eduba
