#include "base/wire_array.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace eduba {
namespace {

TEST(WireArray, NumbersComeBackAsTheyWere) {
  const std::vector<int32_t> numbers = {1, -2, 1 << 30};
  const std::string bytes = BytesOf(numbers);
  EXPECT_EQ(bytes, std::string("\x01\0\0\0\xfe\xff\xff\xff\0\0\0\x40", 12));
  const auto back = NumbersOf<int32_t>(bytes, "ids");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, numbers);
}

TEST(WireArray, BytesNeedNoAlignment) {
  const std::vector<double> numbers = {0.5, -3};
  const std::string bytes = "x" + BytesOf(numbers);
  EXPECT_EQ(*NumbersOf<double>(absl::string_view(bytes).substr(1), "numbers"), numbers);
}

TEST(WireArray, NoBytesAreNoNumbers) {
  EXPECT_TRUE(BytesOf(std::vector<float>()).empty());
  EXPECT_TRUE(NumbersOf<float>("", "numbers")->empty());
}

TEST(WireArray, BytesOfWritableNumbersWriteThem) {
  std::vector<int32_t> numbers = {0};
  AsBytes(absl::MakeSpan(numbers))[1] = 1;
  EXPECT_EQ(numbers[0], 256);
}

TEST(WireArray, RefusesPartsOfANumberAndLeavesTheTargetAlone) {
  std::vector<float> numbers = {7};
  const absl::Status status = ReadNumbers("12345", "queries", numbers);
  EXPECT_EQ(status, absl::InvalidArgumentError("queries have 5 bytes, wanted a multiple of 4"));
  EXPECT_EQ(numbers, std::vector<float>{7});
}

TEST(WireArray, RefusesCountsOutOfRange) {
  EXPECT_EQ(NumbersOf<int32_t>("", "token ids", 1).status(),
            absl::InvalidArgumentError("token ids have 0 bytes, wanted a multiple of 4 from 4"));
  EXPECT_EQ(NumbersOf<int32_t>("123456789012", "token ids", 1, 2).status(),
            absl::InvalidArgumentError("token ids have 12 bytes, wanted a multiple of 4 from 4 to 8"));
  EXPECT_EQ(NumbersOf<int32_t>("123456789012", "token ids", 0, 2).status(),
            absl::InvalidArgumentError("token ids have 12 bytes, wanted a multiple of 4 up to 8"));
  EXPECT_TRUE(NumbersOf<int32_t>("12345678", "token ids", 1, 2).ok());
  std::vector<float> lse;
  EXPECT_EQ(ReadExactNumbers("1234", "lse", 2, lse),
            absl::InvalidArgumentError("lse have 4 bytes, wanted 2 numbers of 4"));
  EXPECT_TRUE(ReadExactNumbers("12345678", "lse", 2, lse).ok());
}

}  // namespace
}  // namespace eduba
