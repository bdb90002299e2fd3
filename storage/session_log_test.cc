#include "storage/session_log.h"

#include <signal.h>
#include <sys/resource.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr RowBytes kRow = {3, 2};

// Writes down what it is told, in words.
class Words final : public AppendLog {
 public:
  absl::Status Begin(const AppendShare& share) override {
    std::vector<std::string> owned;
    for (const PositionRange& range : share.owned) owned.push_back(absl::StrCat(range.begin, "-", range.end));
    return Say(absl::StrCat("begin ", share.at, " ", share.count, " [", absl::StrJoin(owned, " "), "]"));
  }
  absl::Status AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                       absl::Span<const char> values) override {
    return Say(absl::StrCat("rows ", layer, " ", first, " ", count, " ",
                            std::string(keys.data(), keys.size()), " ",
                            std::string(values.data(), values.size())));
  }
  absl::Status Seal(const AppendSeal& seal) override {
    return Say(absl::StrCat("seal ", seal.digest.low, " ", seal.digest.high, " ",
                            absl::StrJoin(seal.exponents, ",")));
  }
  absl::Status Publish(absl::Span<const int16_t> exponents) override {
    return Say(absl::StrCat("publish ", absl::StrJoin(exponents, ",")));
  }

  absl::Status Say(const std::string& word) {
    said.push_back(word);
    return absl::OkStatus();
  }
  std::vector<std::string> said;
};

class SessionLogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = absl::StrCat(::testing::TempDir(), "/session_log_",
                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::unique_ptr<SessionLog> Open() {
    words_.said.clear();
    auto log = SessionLog::Open(folder_, kRow, words_);
    EXPECT_TRUE(log.ok()) << log.status();
    return *std::move(log);
  }

  static void WriteAppend(SessionLog& log, int64_t at, bool seals, bool publishes) {
    AppendShare share;
    share.at = at;
    share.count = 2;
    share.owned = {{at, at + 1}, {at + 1, at + 2}};
    ASSERT_EQ(log.Begin(share), absl::OkStatus());
    ASSERT_EQ(log.AddRows(1, at, 2, absl::MakeConstSpan("kkkKKK", 6), absl::MakeConstSpan("vvVV", 4)),
              absl::OkStatus());
    if (!seals) return;
    ASSERT_EQ(log.Seal({{~uint64_t{0}, 5}, {-3, 7}}), absl::OkStatus());
    ASSERT_EQ(log.frames()->Sync(), absl::OkStatus());
    if (publishes) {
      ASSERT_EQ(log.Publish({-3, 8}), absl::OkStatus());
    }
  }

  std::string folder_;
  Words words_;
};

TEST_F(SessionLogTest, WhatHappenedIsToldAgainInOrder) {
  WriteAppend(*Open(), 0, true, true);
  EXPECT_TRUE(words_.said.empty());
  WriteAppend(*Open(), 2, true, false);
  const auto log = Open();
  EXPECT_THAT(words_.said,
              ElementsAre("begin 0 2 [0-1 1-2]", "rows 1 0 2 kkkKKK vvVV", "seal 18446744073709551615 5 -3,7",
                          "publish -3,8", "begin 2 2 [2-3 3-4]", "rows 1 2 2 kkkKKK vvVV",
                          "seal 18446744073709551615 5 -3,7"));
  // The sealed append is still there to be published.
  ASSERT_EQ(log->Publish({1, 2}), absl::OkStatus());
  Open();
  EXPECT_EQ(words_.said.back(), "publish 1,2");
}

TEST_F(SessionLogTest, ACutDropsTheAppendThatIsNotPublishedAndNothingElse) {
  for (const bool seals : {false, true}) {
    for (const bool reopens : {false, true}) {
      auto log = Open();
      const size_t before = words_.said.size();
      WriteAppend(*log, 0, seals, false);
      EXPECT_EQ(log->Begin({}).code(), absl::StatusCode::kFailedPrecondition);
      if (reopens) log = Open();
      ASSERT_EQ(log->Cut(), absl::OkStatus());
      ASSERT_EQ(log->Cut(), absl::OkStatus());
      WriteAppend(*log, 0, true, true);
      ASSERT_EQ(log->Cut(), absl::OkStatus());
      Open();
      EXPECT_EQ(words_.said.size(), before + 4);
    }
  }
}

// With a limit on the size of files, as on a full disk.
TEST_F(SessionLogTest, AFullDiskRefusesAppendsAndKeepsWhatWasSealed) {
  const auto log = Open();
  WriteAppend(*log, 0, true, false);
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  signal(SIGXFSZ, SIG_IGN);
  rlimit small = old;
  small.rlim_cur = static_cast<rlim_t>(std::filesystem::file_size(folder_ + "/00000001.frames")) + 10;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_EQ(log->Publish({1, 2}), absl::OkStatus());
  const absl::Status full = log->Begin({2, 1, {{2, 3}}, false});
  EXPECT_EQ(log->Cut(), absl::OkStatus());  // Nothing to cut: the append is published.
  Open();
  EXPECT_EQ(words_.said.size(), 3U);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_THAT(std::string(full.message()), HasSubstr("free some space"));

  WriteAppend(*log, 2, true, true);
  Open();
  ASSERT_EQ(words_.said.size(), 8U);
  EXPECT_EQ(words_.said[3], "publish 1,2");
}

TEST_F(SessionLogTest, AFrameOfANewerReleaseIsAnErrorAndStaysOnTheDisk) {
  WriteAppend(*Open(), 0, true, true);
  {
    const auto frames = FrameLog::Open(folder_, [](const Frame&) { return absl::OkStatus(); });
    FrameHeader header;
    header.kind = static_cast<FrameKind>(77);
    ASSERT_EQ((*frames)->Append(header, {}), absl::OkStatus());
  }
  const auto log = SessionLog::Open(folder_, kRow, words_);
  EXPECT_EQ(log.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(log.status().message()), HasSubstr("kind 77"));
}

}  // namespace
}  // namespace eduba
