#include "kernels/cuda/slab_pool.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace eduba::cuda {
namespace {

TEST(SlabPool, GivesWhatThereIsAndNoMore) {
  SlabPool pool(1024);
  EXPECT_EQ(pool.Take(512), 0);
  EXPECT_EQ(pool.Take(1), 512);
  EXPECT_EQ(pool.Take(512), -1);
  EXPECT_EQ(pool.Take(256), 768);
  EXPECT_EQ(pool.Take(1), -1);
  EXPECT_EQ(pool.free_bytes(), 0);
}

TEST(SlabPool, JoinsNeighboursInAnyOrder) {
  for (const std::vector<int>& order :
       {std::vector<int>{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}) {
    SlabPool pool(768);
    for (int i = 0; i < 3; ++i) ASSERT_EQ(pool.Take(256), i * 256);
    for (const int i : order) pool.Give(i * 256, 256);
    EXPECT_EQ(pool.Take(768), 0);
  }
}

TEST(SlabPool, RandomSlabsNeverOverlapAndNothingIsLost) {
  constexpr int64_t kBytes = 1 << 20;
  const uint32_t seed = 5;
  std::mt19937 random(seed);
  SlabPool pool(kBytes);
  struct Slab {
    int64_t offset;
    int64_t bytes;
  };
  std::vector<Slab> slabs;
  for (int round = 0; round < 20'000; ++round) {
    if (random() % 2 == 0 && !slabs.empty()) {
      std::swap(slabs[random() % slabs.size()], slabs.back());
      pool.Give(slabs.back().offset, slabs.back().bytes);
      slabs.pop_back();
      continue;
    }
    const int64_t bytes = 1 + static_cast<int64_t>(random() % 60'000);
    const int64_t offset = pool.Take(bytes);
    if (offset < 0) continue;
    ASSERT_LE(offset + bytes, kBytes) << "seed " << seed;
    for (const Slab& other : slabs) {
      ASSERT_TRUE(other.offset + other.bytes <= offset || offset + bytes <= other.offset) << "seed " << seed;
    }
    slabs.push_back({offset, bytes});
  }
  for (const Slab& slab : slabs) pool.Give(slab.offset, slab.bytes);
  EXPECT_EQ(pool.free_bytes(), kBytes);
  EXPECT_EQ(pool.Take(kBytes), 0);
}

}  // namespace
}  // namespace eduba::cuda
