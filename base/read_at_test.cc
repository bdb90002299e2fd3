#include "base/read_at.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <string>

namespace eduba {
namespace {

TEST(ReadAt, ReadsFromTheOffsetAndStopsAtTheEnd) {
  std::FILE* const file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  const int fd = fileno(file);
  ASSERT_EQ(write(fd, "0123456789", 10), 10);
  std::string out(4, '?');
  EXPECT_EQ(*ReadAt(fd, 3, absl::MakeSpan(out)), 4);
  EXPECT_EQ(out, "3456");
  EXPECT_EQ(*ReadAt(fd, 8, absl::MakeSpan(out)), 2);
  EXPECT_EQ(out, "8956");
  EXPECT_EQ(*ReadAt(fd, 10, absl::MakeSpan(out)), 0);
  EXPECT_EQ(*ReadAt(fd, 0, {}), 0);
  std::fclose(file);
}

TEST(ReadAt, SaysWhatTheSystemSays) {
  std::string out(4, '?');
  const absl::Status status = ReadAt(-1, 0, absl::MakeSpan(out)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), "Bad file descriptor");
}

}  // namespace
}  // namespace eduba
