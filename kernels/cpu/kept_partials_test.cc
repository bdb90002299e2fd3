#include "kernels/cpu/kept_partials.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace eduba {
namespace {

TEST(KeptPartials, HoldsNoMoreThanItMayAndGivesNoByteTwice) {
  constexpr int64_t kMost = 1 << 20;
  KeptPartials kept(kMost);
  std::mt19937_64 random(1);
  int64_t refused = 0;
  for (int round = 0; round < 200; ++round) {
    std::vector<std::pair<char*, int64_t>> taken;
    for (uint64_t i = random() % 12; i > 0; --i) {
      const auto bytes = static_cast<int64_t>(1 + random() % 200'000);
      char* const memory = reinterpret_cast<char*>(kept.Take(bytes));
      EXPECT_LE(kept.bytes(), kMost);
      if (memory == nullptr) {
        ++refused;
        continue;
      }
      EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 64, 0U);
      std::fill_n(memory, bytes, 'x');
      for (const auto& [other, count] : taken) {
        EXPECT_TRUE(other + count <= memory || memory + bytes <= other);
      }
      taken.emplace_back(memory, bytes);
    }
    for (size_t i = 0; i < taken.size(); ++i) kept.Return();
  }
  EXPECT_GT(refused, 0);
}

TEST(KeptPartials, IsOneBlockForWhatWasInSeveral) {
  KeptPartials kept(1 << 20);
  for (int i = 0; i < 3; ++i) ASSERT_NE(kept.Take(1000), nullptr);
  for (int i = 0; i < 3; ++i) kept.Return();
  const int64_t bytes = kept.bytes();
  const float* const first = kept.Take(1000);
  EXPECT_EQ(kept.Take(1000), first + 256);
  EXPECT_EQ(kept.Take(1000), first + 512);
  EXPECT_EQ(kept.bytes(), bytes);
  for (int i = 0; i < 3; ++i) kept.Return();
  // It is all there is for the next.
  EXPECT_EQ(kept.Take(bytes), first);
  EXPECT_EQ(kept.bytes(), bytes);
  kept.Return();
  EXPECT_EQ(kept.Take((1 << 20) + 1), nullptr);
  const float* const all = kept.Take(1 << 20);
  EXPECT_NE(all, nullptr);
  EXPECT_EQ(kept.Take(1), nullptr);
  // Who got nothing has nothing to return.
  kept.Return();
  EXPECT_EQ(kept.Take(1 << 20), all);
}

}  // namespace
}  // namespace eduba
