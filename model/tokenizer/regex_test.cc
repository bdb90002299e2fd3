#include "model/tokenizer/regex.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace eduba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> Matches(const std::string& pattern, const std::string& text) {
  const auto regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << pattern << regex.status();
  if (!regex.ok()) return {};
  const auto matches = regex->FindAll(text);
  EXPECT_TRUE(matches.ok()) << matches.status();
  std::vector<std::string> found;
  for (const Regex::Match& match : *matches) {
    found.push_back(text.substr(match.begin, match.end - match.begin));
  }
  return found;
}

TEST(TokenizerRegex, FindsAllMatchesFromTheLeft) {
  EXPECT_THAT(Matches(R"(\p{N}{1,3}|\p{L}+)", "ab12345 ünï"), ElementsAre("ab", "123", "45", "ünï"));
  EXPECT_THAT(Matches(R"(\s+(?!\S)|\s+)", "a   b "), ElementsAre("  ", " ", " "));
  EXPECT_THAT(Matches(R"((?i:'s|'ll))", "'S 'lL 's"), ElementsAre("'S", "'lL", "'s"));
  EXPECT_THAT(Matches(R"([^\s\p{L}]+)", "a.-1b"), ElementsAre(".-1"));
  EXPECT_THAT(Matches(R"([a-c\-x.]+)", "ab-d.x]"), ElementsAre("ab-", ".x"));
  EXPECT_THAT(Matches(R"([+-]+)", "1+-2"), ElementsAre("+-"));
  EXPECT_THAT(Matches(R"((a)(?=b)|\d++)", "ab ac 12"), ElementsAre("a", "12"));
  EXPECT_THAT(Matches(R"(\v|#| )", "a\vb#c\n "), ElementsAre("\v", "#", " "));
}

TEST(TokenizerRegex, WhiteSpaceAndCategoriesAreUnicode16s) {
  EXPECT_THAT(Matches(R"(\s+)", "a\xC2\x85\xC2\xA0\xE3\x80\x80g"),
              ElementsAre("\xC2\x85\xC2\xA0\xE3\x80\x80"));
  EXPECT_THAT(Matches(R"(\s)", "\xE1\xA0\x8E \xE2\x80\x8B"),
              ElementsAre(" "));  // U+180E and U+200B are none.
  // U+31350 came in Unicode 15, U+1C89 in 16.
  EXPECT_THAT(Matches(R"(\p{L}+)", "\xF0\xB1\x8D\x90\xE1\xB2\x89"),
              ElementsAre("\xF0\xB1\x8D\x90\xE1\xB2\x89"));
  EXPECT_THAT(Matches(R"([\p{Lu}]|\P{L})", "\xE1\xB2\x89\xE1\xB2\x8A"), ElementsAre("\xE1\xB2\x89"));
}

TEST(TokenizerRegex, WhatMeansDifferentThingsElsewhereIsRefusedByName) {
  for (const auto& [pattern, named] : std::vector<std::pair<std::string, std::string>>{
           {"a.", "\".\""},          {"^a", "\"^\""},
           {"a$", "\"$\""},          {R"(\w+)", R"(\w)"},
           {R"(\bx)", R"(\b)"},      {R"((a)\1)", R"(\1)"},
           {"(?<n>a)", "(?<"},       {"(?<=a)b", "(?<"},
           {"(?>a)", "(?>"},         {"[[:alpha:]]", "[ in"},
           {"[a&&b]", "&&"},         {R"([\S])", R"(\S in a class)"},
           {"a{,3}", "\"{\""},       {"a{2}?", "}?"},
           {"a{2}+", "}+"},          {R"(\p{Greek})", R"(\p{Greek})"},
           {R"(\pL)", R"(\p)"},      {"[a", "\"[\""},
           {"[]a]", "[]"},           {"a\\", "\"\\\""},
           {R"([a-\s])", "a range"}, {R"(\x41)", R"(\x)"},
           {R"(\Aa)", R"(\A)"},      {R"(\Kab)", R"(\K)"}}) {
    const auto regex = Regex::Compile(pattern);
    EXPECT_EQ(regex.status().code(), absl::StatusCode::kUnimplemented) << pattern << regex.status();
    EXPECT_THAT(std::string(regex.status().message()), HasSubstr(named)) << pattern;
  }
}

TEST(TokenizerRegex, ARefusalIsOneLineWhateverStandsInTheExpression) {
  for (const char* pattern : {"[^\\\n]", "a\\\n", "(?\n)", "a{1}\n{2}"}) {
    const auto regex = Regex::Compile(pattern);
    if (regex.ok()) continue;
    EXPECT_EQ(regex.status().message().find('\n'), std::string::npos) << regex.status();
  }
  EXPECT_FALSE(Regex::Compile("[^\\\n]").ok());
}

TEST(TokenizerRegex, WhatIsNoExpressionOrSplitsNothingIsRefused) {
  for (const char* pattern : {"(a", "a)", "*", "a**", "a*", "", "a|", "(?!a)", "[b-a]", "a{5,2}", "\xFF"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kInvalidArgument) << pattern;
  }
  EXPECT_FALSE(Regex::Compile(std::string(10000, 'a')).ok());
}

TEST(TokenizerRegex, AHostilePatternEndsInAnError) {
  const auto regex = Regex::Compile("(?:a|aa)+[bc]");
  ASSERT_TRUE(regex.ok());
  EXPECT_EQ(regex->FindAll(std::string(200, 'a')).status().code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace eduba
