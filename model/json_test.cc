#include "model/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace eduba {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string ErrorOf(const std::string& text, const JsonLimits& limits = {}) {
  const auto parsed = ParseJson(text, limits, "file.json");
  return parsed.ok() ? "OK" : std::string(parsed.status().message());
}

TEST(Json, ReadsWhatWasWritten) {
  const json value = {{"a", {1, -2, 3.5, "x\n\u00e9", nullptr, true, json::array(), json::object()}},
                      {"", {{"", 0}}}};
  const auto parsed = ParseJson(value.dump(), {}, "file.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, value);
  EXPECT_EQ(*ParseJson(" 7 ", {}, "file.json"), 7);
}

TEST(Json, AKeyMayAppearOnceInAnObject) {
  EXPECT_THAT(ErrorOf(R"({"a": 1, "b": {"a": 2}, "a": 3})"), HasSubstr("the key \"a\" appears twice"));
  // Also when it is spelled otherwise.
  EXPECT_THAT(ErrorOf(R"({"a": 1, "\u0061": 1})"), HasSubstr("appears twice"));
  EXPECT_EQ(ErrorOf(R"({"a": 1, "b": {"a": 2}, "c": {"a": 3}})"), "OK");
}

TEST(Json, DepthAndSizeAreLimited) {
  EXPECT_EQ(ErrorOf("[[{\"a\": 1}]]", {100, 3}), "OK");
  EXPECT_THAT(ErrorOf("[[{\"a\": []}]]", {100, 3}), HasSubstr("nested deeper than 3"));
  EXPECT_THAT(ErrorOf("[[{\"a\": 1}]]", {11, 3}), HasSubstr("12 bytes of JSON, at most 11"));
  EXPECT_THAT(ErrorOf(std::string(1 << 20, '['), {1 << 20, 16}), HasSubstr("nested deeper than 16"));
}

TEST(Json, WhatIsNoneIsRefusedWithItsPlace) {
  for (const char* text : {"", "nul", "{\"a\" 1}", "[1 2]", "\"\xff\"", "\"\n\"", "1e999", "NaN", "[1]x",
                           "'a'", "\"\\ud800\""}) {
    EXPECT_THAT(ErrorOf(text), HasSubstr("file.json: not the JSON that is wanted: syntax error at byte "))
        << text;
  }
}

TEST(Json, TextInMessagesIsShortAndOnOneLine) {
  EXPECT_EQ(JsonText(json("a\nb\u00e9")), "\"a\\nb\\u00e9\"");
  EXPECT_EQ(JsonText(json(std::string(500, 'x'))).size(), 60u);
  EXPECT_EQ(JsonText(json("\xff")), "\"\\ufffd\"");
}

}  // namespace
}  // namespace eduba
