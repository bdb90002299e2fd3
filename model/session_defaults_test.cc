#include "model/session_defaults.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

TEST(SessionDefaults, SaysWhatIsThereAndNothingElse) {
  const auto all = ParseSessionDefaults(
      R"({"policy": "streaming", "sink_token_id": 7, "sink_tokens": 3, "window": 256, "positions": "rolling"})",
      "f");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->policy, "streaming");
  EXPECT_EQ(all->positions, "rolling");
  EXPECT_EQ(all->window, 256);
  EXPECT_EQ(all->sink_tokens, 3);
  EXPECT_EQ(all->sink_token_id, 7);
  const auto some = ParseSessionDefaults(R"({"sink_tokens": 0, "window": null})", "f");
  ASSERT_TRUE(some.ok()) << some.status();
  EXPECT_EQ(some->policy, "");
  EXPECT_EQ(some->positions, "");
  EXPECT_FALSE(some->window.has_value());
  EXPECT_EQ(some->sink_tokens, 0);
  EXPECT_FALSE(some->sink_token_id.has_value());
}

TEST(SessionDefaults, RefusesByNameInOneLine) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"polizy": "star"})", "polizy"},
      {R"({"policy": "window"})", "policy"},
      {R"({"policy": 3})", "policy"},
      {R"({"positions": "relative"})", "positions"},
      {R"({"window": -1})", "window"},
      {R"({"window": 1.5})", "window"},
      {R"({"sink_tokens": "4"})", "sink_tokens"},
      {R"({"sink_tokens": 99999999999})", "sink_tokens"},
      {R"({"sink_token_id": 4294967296})", "sink_token_id"},
      {R"([1])", "[1]"},
      {R"({"window": 1, "window": 2})", "window"},
      {"{", "f: "},
      {"", "f: "},
  };
  for (const auto& [text, words] : cases) {
    const absl::Status status = ParseSessionDefaults(text, "f").status();
    EXPECT_THAT(std::string(status.message()),
                AllOf(StartsWith("f: "), HasSubstr(words), Not(HasSubstr("\n"))))
        << text;
  }
}

TEST(SessionDefaults, AFolderWithoutTheFileHasNone) {
  const auto none = LoadSessionDefaults(testing::TempDir());
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_FALSE(none->has_value());
}

}  // namespace
}  // namespace eduba
