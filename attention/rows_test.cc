#include "attention/rows.h"

#include <cmath>
#include <vector>

#include "attention/sequence.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

constexpr DType kAll[] = {DType::kF32, DType::kBf16, DType::kF16};

TEST(Rows, ExponentsAreTheSmallestBound) {
  for (const DType dtype : kAll) {
    const auto exponent = [dtype](float value) {
      std::vector<float> storage(1);
      StoreElement(storage.data(), dtype, 0, value);
      std::vector<uint32_t> magnitude(1);
      RaiseMagnitudes(storage.data(), dtype, 1, 1, magnitude.data());
      return static_cast<int>(ExponentOfMagnitude(magnitude[0], dtype));
    };
    EXPECT_EQ(exponent(0.0f), kNoExponent);
    EXPECT_EQ(exponent(-0.0f), kNoExponent);
    EXPECT_EQ(exponent(1.0f), 0);
    EXPECT_EQ(exponent(-1.0078125f), 1);
    EXPECT_EQ(exponent(0.5f), -1);
    EXPECT_EQ(exponent(-0.75f), 0);
    EXPECT_EQ(exponent(2.0f), 1);
    EXPECT_EQ(exponent(-3.0f), 2);
    EXPECT_EQ(exponent(65504.0f), 16);
    EXPECT_EQ(exponent(std::ldexp(1.0f, -24)), -24);
  }
  // The ends of f32.
  uint32_t magnitude = 1;
  EXPECT_EQ(ExponentOfMagnitude(magnitude, DType::kF32), -149);
  magnitude = 0x7f7fffff;
  EXPECT_EQ(ExponentOfMagnitude(magnitude, DType::kF32), 128);
}

TEST(Rows, MagnitudesAreMaximaOfTheirColumn) {
  const std::vector<float> rows = {1, -8, 0, /**/ -3, 2, 0};
  std::vector<uint32_t> magnitudes(3);
  RaiseMagnitudes(rows.data(), DType::kF32, 2, 3, magnitudes.data());
  EXPECT_EQ(ExponentOfMagnitude(magnitudes[0], DType::kF32), 2);
  EXPECT_EQ(ExponentOfMagnitude(magnitudes[1], DType::kF32), 3);
  EXPECT_EQ(ExponentOfMagnitude(magnitudes[2], DType::kF32), kNoExponent);
}

}  // namespace
}  // namespace eduba
