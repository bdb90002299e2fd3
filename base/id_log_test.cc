#include "base/id_log.h"

#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

constexpr int64_t kBlockBytes = IdLog::kBlockIds * 4;

std::vector<int32_t> Numbers(int64_t count, int32_t first) {
  std::vector<int32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

std::vector<int32_t> All(const IdLog& log) {
  std::vector<int32_t> ids(log.size());
  EXPECT_TRUE(log.Read(0, absl::MakeSpan(ids)).ok());
  return ids;
}

// The process's file of ids, which has no name any more; empty: there is none yet.
std::filesystem::path TheFile() {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (!absl::StrContains(target, "/eduba-ids-")) continue;
    EXPECT_TRUE(absl::EndsWith(target, " (deleted)")) << target;
    return entry.path();
  }
  return {};
}

int64_t FileBytes() {
  const std::filesystem::path file = TheFile();
  return file.empty() ? 0 : static_cast<int64_t>(std::filesystem::file_size(file));
}

TEST(IdLog, HoldsWhatWasAppendedInAnyPieces) {
  std::mt19937 random(1);
  IdLog log;
  std::vector<int32_t> expected;
  while (expected.size() < 5 * IdLog::kBlockIds) {
    const auto most = static_cast<int64_t>(random() % 3 == 0 ? 2 * IdLog::kBlockIds + 2 : 300);
    const std::vector<int32_t> some =
        Numbers(static_cast<int64_t>(random() % most), static_cast<int32_t>(random() >> 1));
    log.Append(some);
    expected.insert(expected.end(), some.begin(), some.end());
    ASSERT_EQ(log.size(), std::ssize(expected));
    const auto begin = static_cast<int64_t>(random() % (expected.size() + 1));
    std::vector<int32_t> part(random() % (expected.size() - begin + 1));
    ASSERT_TRUE(log.Read(begin, absl::MakeSpan(part)).ok());
    ASSERT_TRUE(std::equal(part.begin(), part.end(), expected.begin() + begin));
  }
  EXPECT_EQ(All(log), expected);
}

TEST(IdLog, WritesBlocksToAFileAndUsesTheirPlaceAgain) {
  IdLog log;
  log.Append(Numbers(IdLog::kBlockIds - 1, 0));
  const int64_t before = FileBytes();
  log.Append(Numbers(100 * IdLog::kBlockIds, 7));
  const int64_t after = FileBytes();
  EXPECT_GE(after, before + 90 * kBlockBytes);  // A few may have found a place.
  log = IdLog();
  log.Append(Numbers(100 * IdLog::kBlockIds, 8));
  EXPECT_EQ(FileBytes(), after);
}

TEST(IdLog, CopiesShareWhatIsWrittenAndThenGoTheirOwnWay) {
  IdLog first;
  first.Append(Numbers(3 * IdLog::kBlockIds + 5, 0));
  const int64_t bytes = FileBytes();
  IdLog second = first;
  EXPECT_EQ(FileBytes(), bytes);
  first.Append(Numbers(2 * IdLog::kBlockIds, 1'000'000));
  second.Append(Numbers(2 * IdLog::kBlockIds, 2'000'000));
  std::vector<int32_t> expected = Numbers(3 * IdLog::kBlockIds + 5, 0);
  const std::vector<int32_t> tail = Numbers(2 * IdLog::kBlockIds, 2'000'000);
  expected.insert(expected.end(), tail.begin(), tail.end());
  first = IdLog();
  first.Append(Numbers(4 * IdLog::kBlockIds, -1));  // Where `first` was, if nobody else needs it.
  EXPECT_EQ(All(second), expected);
}

// A coordinator and its workers may keep logs in one process, on several threads.
TEST(IdLog, LogsOfTwoThreadsDoNotMeet) {
  const auto run = [](int32_t first) {
    for (int round = 0; round < 10; ++round) {
      IdLog log;
      for (int i = 0; i < 8; ++i) {
        log.Append(Numbers(IdLog::kBlockIds / 2 + 1, first + i * (IdLog::kBlockIds / 2 + 1)));
      }
      EXPECT_EQ(All(log), Numbers(log.size(), first));
    }
  };
  std::thread other(run, 1 << 20);
  run(2 << 20);
  other.join();
}

TEST(IdLog, KeepsInMemoryWhatADiskDoesNotTake) {
  IdLog log;
  log.Append(Numbers(2 * IdLog::kBlockIds, 0));
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit none = {static_cast<rlim_t>(kBlockBytes / 2), limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &none), 0);
  const std::vector<int32_t> more = Numbers(200 * IdLog::kBlockIds, static_cast<int32_t>(log.size()));
  log.Append(more);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  const int64_t bytes = FileBytes();
  log.Append(Numbers(300 * IdLog::kBlockIds, static_cast<int32_t>(log.size())));
  EXPECT_GT(FileBytes(), bytes);
  EXPECT_EQ(All(log), Numbers(502 * IdLog::kBlockIds, 0));
}

TEST(IdLog, SaysThatTheDiskDoesNotGiveThemBack) {
  IdLog log;
  log.Append(Numbers(400 * IdLog::kBlockIds, 0));
  std::filesystem::resize_file(TheFile(), 0);
  std::vector<int32_t> ids(log.size());
  const absl::Status status = log.Read(0, absl::MakeSpan(ids));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(std::string(status.message()), "cut off")) << status;
}

}  // namespace
}  // namespace eduba
