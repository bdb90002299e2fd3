#include "cli/output.h"

#include <gtest/gtest.h>

namespace eduba {
namespace {

TEST(Output, BytesHaveTheLargestUnitThatFits) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(812), "812 B");
  EXPECT_EQ(BytesText(int64_t{3} << 29), "1.5 GiB");
}

TEST(Output, ColumnsOfNumbersAreSetToTheRight) {
  testing::internal::CaptureStdout();
  PrintTable({{"name", "count"}, {"a", "1"}, {"long", "234567"}});
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "name   count\na          1\nlong  234567\n");
}

TEST(Output, JsonKeepsTheOrderOfItsFields) {
  testing::internal::CaptureStdout();
  PrintJsonLine({{"z", 1}, {"a", "x"}});
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "{\"z\":1,\"a\":\"x\"}\n");
}

}  // namespace
}  // namespace eduba
