#include "storage/token_frames.h"

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

// The ids as they are in the end, and how each was read.
struct Tokens final : TokenFrames::Reader {
  absl::Status Add(int64_t at, absl::Span<const int32_t> ids, bool are_generated) override {
    EXPECT_EQ(at, static_cast<int64_t>(all.size()));
    all.insert(all.end(), ids.begin(), ids.end());
    generated.resize(all.size(), are_generated);
    return absl::OkStatus();
  }
  absl::Status SetLength(int64_t length) override {
    all.resize(length);
    generated.resize(length);
    return absl::OkStatus();
  }

  std::vector<int32_t> all;
  std::vector<bool> generated;
};

class TokenFramesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = absl::StrCat(::testing::TempDir(), "/token_frames_",
                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::unique_ptr<TokenFrames> Open(Tokens& tokens) const {
    auto opened = TokenFrames::Open(folder_, tokens);
    EXPECT_TRUE(opened.ok()) << opened.status();
    return *std::move(opened);
  }

  std::string folder_;
};

TEST_F(TokenFramesTest, IdsAreThereAgainAndHowTheyWereRead) {
  std::vector<int32_t> many(700000);  // More than a frame takes.
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int32_t>(i * 7 % 50001);
  Tokens want;
  {
    Tokens none;
    const auto tokens = Open(none);
    EXPECT_TRUE(none.all.empty());
    ASSERT_EQ(tokens->Add(0, many, false), absl::OkStatus());
    ASSERT_EQ(want.Add(0, many, false), absl::OkStatus());
    for (int64_t i = 0; i < 5; ++i) {
      const auto id = static_cast<int32_t>(i);
      ASSERT_EQ(tokens->Add(700000 + i, {id}, true), absl::OkStatus());
      ASSERT_EQ(want.Add(700000 + i, {id}, true), absl::OkStatus());
    }
    ASSERT_EQ(tokens->SetLength(700003), absl::OkStatus());
    ASSERT_EQ(want.SetLength(700003), absl::OkStatus());
    ASSERT_EQ(tokens->frames()->Sync(), absl::OkStatus());
  }
  Tokens found;
  Open(found);
  EXPECT_EQ(found.all, want.all);
  EXPECT_EQ(found.generated, want.generated);
}

TEST_F(TokenFramesTest, WhatDoesNotFollowIsAnError) {
  {
    Tokens none;
    const auto tokens = Open(none);
    ASSERT_EQ(tokens->Add(0, {1, 2}, false), absl::OkStatus());
    ASSERT_EQ(tokens->Add(3, {4}, false), absl::OkStatus());
  }
  Tokens found;
  const auto opened = TokenFrames::Open(folder_, found);
  EXPECT_EQ(opened.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(opened.status().message()), HasSubstr("does not follow the 2 tokens before it"));
}

TEST_F(TokenFramesTest, RoomIsMadeBeforeIdsComeOrRefused) {
  Tokens none;
  const auto tokens = Open(none);
  ASSERT_EQ(tokens->Reserve(1000), absl::OkStatus());
  for (int64_t i = 0; i < 1000; ++i) ASSERT_EQ(tokens->Add(i, {5}, true), absl::OkStatus());
  const absl::Status refused = tokens->Reserve(int64_t{1} << 42);  // No disk is so large.
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  ASSERT_EQ(tokens->Add(1000, {6}, true), absl::OkStatus());
  Tokens found;
  Open(found);
  EXPECT_EQ(found.all.size(), 1001U);
}

}  // namespace
}  // namespace eduba
