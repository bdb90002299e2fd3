#include "attention/rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention/sequence.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

constexpr DType kAll[] = {DType::kF32, DType::kBf16, DType::kF16};

// Every pair of 16-bit patterns is in the high or low half of some element of the result.
std::vector<char> Samples(DType dtype, int64_t count) {
  std::mt19937 random(7);
  std::vector<char> bytes(count * DTypeBytes(dtype));
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::kF32) {
      const uint32_t bits = random();
      std::memcpy(bytes.data() + 4 * i, &bits, 4);
    } else {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(bytes.data() + 2 * i, &bits, 2);
    }
  }
  return bytes;
}

TEST(Rows, ArraysConvertAsSingleElementsDo) {
  constexpr int64_t kCount = 65536 + 13;
  for (const DType from : kAll) {
    const std::vector<char> source = Samples(from, kCount);
    for (const DType to : kAll) {
      std::vector<char> converted(kCount * DTypeBytes(to));
      ConvertElements(source.data(), from, converted.data(), to, kCount);
      std::vector<char> single(kCount * DTypeBytes(to));
      for (int64_t i = 0; i < kCount; ++i) {
        StoreElement(single.data(), to, i, LoadElement(source.data(), from, i));
      }
      if (from == to) single = source;  // NaN payloads stay
      EXPECT_EQ(converted, single) << DTypeName(from) << " to " << DTypeName(to);
    }
  }
}

TEST(Rows, TheFirstNonFiniteElementIsFound) {
  for (const DType dtype : kAll) {
    std::vector<float> storage(100);
    for (int64_t i = 0; i < 100; ++i) StoreElement(storage.data(), dtype, i, -3.5f);
    EXPECT_EQ(FirstNonFinite(storage.data(), dtype, 100), -1);
    EXPECT_EQ(FirstNonFinite(storage.data(), dtype, 0), -1);
    StoreElement(storage.data(), dtype, 98, std::numeric_limits<float>::quiet_NaN());
    EXPECT_EQ(FirstNonFinite(storage.data(), dtype, 100), 98);
    EXPECT_EQ(FirstNonFinite(storage.data(), dtype, 98), -1);
    StoreElement(storage.data(), dtype, 37, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(FirstNonFinite(storage.data(), dtype, 100), 37);
  }
}

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
