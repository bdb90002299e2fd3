#include "base/position_ranges.h"

#include "gtest/gtest.h"

namespace eduba {
namespace {

TEST(Union, OfNothingIsNothing) {
  EXPECT_TRUE(Union({}).empty());
  EXPECT_TRUE(Union({{5, 5}, {7, 3}}).empty());
}

TEST(Union, JoinsRangesThatOverlapOrTouchInAnyOrder) {
  const std::vector<PositionRange> wanted = {{0, 4}, {6, 20}};
  EXPECT_EQ(Union({{10, 20}, {0, 3}, {6, 10}, {3, 4}, {7, 8}, {5, 5}}), wanted);
}

TEST(RangeText, NamesBothEnds) { EXPECT_EQ(RangeText({3, 9}), "[3, 9)"); }

}  // namespace
}  // namespace eduba
