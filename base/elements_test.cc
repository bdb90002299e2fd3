#include "base/elements.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace eduba {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBf16, DType::kF16};

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

TEST(Elements, ArraysConvertAsSingleElementsDo) {
  constexpr int64_t kCount = 65536 + 13;
  for (const DType from : kTypes) {
    const std::vector<char> source = Samples(from, kCount);
    for (const DType to : kTypes) {
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

TEST(Elements, TheFirstNonFiniteElementIsFound) {
  for (const DType dtype : kTypes) {
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

TEST(Elements, RowBytesCountKeysAndValuesApart) {
  const RowBytes bytes = RowBytesOf(DType::kBf16, 8, 128, 64);
  EXPECT_EQ(bytes.keys, 2048);
  EXPECT_EQ(bytes.values, 1024);
  EXPECT_EQ(bytes.total(), 3072);
  EXPECT_EQ(RowBytesOf(DType::kF32, 8, 128, 64).total(), 6144);
}

}  // namespace
}  // namespace eduba
