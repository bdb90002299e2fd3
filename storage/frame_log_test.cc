#include "storage/frame_log.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

struct Written {
  FrameKind kind = FrameKind::kRows;
  int64_t first = 0;
  std::string payload;

  bool operator==(const Written&) const = default;
};

class FrameLogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = absl::StrCat(::testing::TempDir(), "/frame_log_",
                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string Path(int segment) const { return absl::StrCat(folder_, "/0000000", segment, ".frames"); }

  // Opens the log; `read_` is what it holds.
  std::unique_ptr<FrameLog> Open() {
    read_.clear();
    places_.clear();
    auto log = FrameLog::Open(folder_, [this](const Frame& frame) {
      read_.push_back(
          {frame.header.kind, frame.header.first, std::string(frame.payload.data(), frame.payload.size())});
      places_.push_back(frame.place);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(frame.payload.data()) % 8, 0U);
      return absl::OkStatus();
    });
    EXPECT_TRUE(log.ok()) << log.status();
    return *std::move(log);
  }

  static absl::Status Append(FrameLog& log, const Written& written) {
    FrameHeader header;
    header.kind = written.kind;
    header.first = written.first;
    const auto bytes = absl::MakeConstSpan(written.payload);
    return log.Append(header, {bytes.first(bytes.size() / 2), bytes.subspan(bytes.size() / 2)});
  }

  // `count` frames whose payloads have 0 to `bytes_max` bytes.
  static std::vector<Written> Some(int count, size_t bytes_max, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<Written> some(count);
    for (int i = 0; i < count; ++i) {
      some[i].kind = i % 3 == 0 ? FrameKind::kBegin : FrameKind::kRows;
      some[i].first = i;
      some[i].payload.resize(random() % (bytes_max + 1));
      for (char& c : some[i].payload) c = static_cast<char>(random());
    }
    return some;
  }

  std::string Bytes(int segment) const {
    std::ifstream file(Path(segment), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void SetBytes(int segment, const std::string& bytes) const {
    std::ofstream(Path(segment), std::ios::binary | std::ios::trunc) << bytes;
  }

  std::string folder_;
  std::vector<Written> read_;
  std::vector<LogPlace> places_;
};

TEST_F(FrameLogTest, WhatIsWrittenIsReadAgainAndGoneOnWith) {
  std::vector<Written> all = Some(40, 300, 1);
  for (int round = 0; round < 4; ++round) {
    const auto log = Open();
    EXPECT_EQ(log->damage(), "");
    ASSERT_EQ(read_, std::vector<Written>(all.begin(), all.begin() + round * 10));
    for (int i = 0; i < 10; ++i) ASSERT_EQ(Append(*log, all[round * 10 + i]), absl::OkStatus());
    ASSERT_EQ(log->Sync(), absl::OkStatus());
    if (round % 2 == 0) log->Rest();
  }
  Open();
  EXPECT_EQ(read_, all);
  struct stat info {};
  ASSERT_EQ(stat(Path(1).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600U);
}

TEST_F(FrameLogTest, FullSegmentsAreFollowedByNewOnesAndACutReachesBack) {
  const auto log = Open();
  const Written large{FrameKind::kRows, 7, std::string(FrameLog::kSegmentBytes / 3, 'x')};
  std::vector<Written> all;
  std::vector<LogPlace> ends;
  for (int i = 0; i < 9; ++i) {
    ends.push_back(log->end());
    all.push_back(large);
    all.back().first = i;
    ASSERT_EQ(Append(*log, all.back()), absl::OkStatus());
    if (i % 4 == 1) {
      ASSERT_EQ(log->Sync(), absl::OkStatus());
    }
  }
  ASSERT_EQ(log->Sync(), absl::OkStatus());
  Open();
  EXPECT_EQ(read_, all);
  EXPECT_TRUE(std::filesystem::exists(Path(3)));

  ASSERT_EQ(log->CutTo(ends[2]), absl::OkStatus());
  EXPECT_FALSE(std::filesystem::exists(Path(2)));
  all.resize(2);
  Open();
  EXPECT_EQ(read_, all);
  all.push_back({FrameKind::kSeal, 9, "after the cut"});
  ASSERT_EQ(Append(*log, all.back()), absl::OkStatus());
  Open();
  EXPECT_EQ(read_, all);
}

// What a power cut leaves: any beginning of the file.
TEST_F(FrameLogTest, AnyBeginningOfTheFileIsReadUpToItsLastWholeFrameAndGoneOnWith) {
  const std::vector<Written> all = Some(12, 40, 2);
  {
    const auto log = Open();
    for (const Written& one : all) ASSERT_EQ(Append(*log, one), absl::OkStatus());
  }
  const std::string bytes = Bytes(1);
  Open();
  std::vector<int64_t> ends = {static_cast<int64_t>(sizeof(FrameHeader))};
  for (size_t i = 1; i < places_.size(); ++i) ends.push_back(places_[i].offset);
  ends.push_back(static_cast<int64_t>(bytes.size()));
  for (size_t size = 0; size <= bytes.size(); ++size) {
    SetBytes(1, bytes.substr(0, size));
    const auto log = Open();
    const auto whole = std::upper_bound(ends.begin(), ends.end(), static_cast<int64_t>(size)) - ends.begin();
    const bool at_end = size == 0 || (whole > 0 && ends[whole - 1] == static_cast<int64_t>(size));
    EXPECT_EQ(log->damage().empty(), at_end) << size;
    std::vector<Written> left(all.begin(), all.begin() + std::max<int64_t>(0, whole - 1));
    ASSERT_EQ(read_, left) << size;
    left.push_back({FrameKind::kSeal, 5, "next"});
    ASSERT_EQ(Append(*log, left.back()), absl::OkStatus());
    const auto again = Open();
    EXPECT_EQ(again->damage(), "");
    ASSERT_EQ(read_, left) << size;
  }
}

TEST_F(FrameLogTest, EveryFlippedBitIsFoundAndNothingAfterItIsServed) {
  const std::vector<Written> all = Some(6, 50, 3);
  {
    const auto log = Open();
    for (const Written& one : all) ASSERT_EQ(Append(*log, one), absl::OkStatus());
  }
  const std::string bytes = Bytes(1);
  Open();
  const std::vector<LogPlace> places = places_;
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    SetBytes(1, damaged);
    const auto log = Open();
    EXPECT_THAT(log->damage(), HasSubstr(absl::StrCat(Path(1), " is not whole from byte "))) << bit;
    size_t before = 0;
    while (before + 1 < places.size() && places[before + 1].offset <= static_cast<int64_t>(bit / 8)) ++before;
    if (static_cast<int64_t>(bit / 8) < places[0].offset) before = 0;
    ASSERT_EQ(read_, std::vector<Written>(all.begin(), all.begin() + before)) << bit;
    // Reading changes nothing.
    ASSERT_EQ(Bytes(1), damaged);
  }
}

TEST_F(FrameLogTest, FramesThatLieElsewhereAreNotTaken) {
  {
    const auto log = Open();
    for (int i = 0; i < 2; ++i) ASSERT_EQ(Append(*log, {FrameKind::kRows, 1, "same"}), absl::OkStatus());
  }
  Open();
  const std::string bytes = Bytes(1);
  const auto size = static_cast<size_t>(places_[1].offset - places_[0].offset);
  // The second frame in the place of the first, and the other way round.
  SetBytes(1, absl::StrCat(bytes.substr(0, places_[0].offset), bytes.substr(places_[1].offset),
                           bytes.substr(places_[0].offset, size)));
  EXPECT_THAT(Open()->damage(), HasSubstr("checksum"));
  EXPECT_TRUE(read_.empty());
}

TEST_F(FrameLogTest, AnErrorOfTheVisitorEndsTheReadingAndChangesNothing) {
  {
    const auto log = Open();
    for (int i = 0; i < 3; ++i) ASSERT_EQ(Append(*log, {FrameKind::kRows, i, "x"}), absl::OkStatus());
  }
  int seen = 0;
  const auto log = FrameLog::Open(folder_, [&](const Frame&) {
    return ++seen == 2 ? absl::ResourceExhaustedError("no room") : absl::OkStatus();
  });
  EXPECT_EQ(log.status(), absl::ResourceExhaustedError("no room"));
  Open();
  EXPECT_EQ(read_.size(), 3U);
}

}  // namespace
}  // namespace eduba
