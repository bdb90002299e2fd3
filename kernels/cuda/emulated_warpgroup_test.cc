#include "kernels/cuda/emulated_warpgroup.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/page_layout.h"
#include "kernels/cuda/page_warpgroup.h"

namespace eduba::cuda {
namespace {

constexpr int kColumns = 64;
constexpr int kBytes = 16 << 10;

// A block of warpgroups over memory of its own.
struct EmulatedWarpgroups {
  explicit EmulatedWarpgroups(int groups) : block(0, groups * kGroupThreads, memory, kBytes) {
    std::memset(memory, 0xff, sizeof(memory));
  }
  uint16_t* At(int address) { return reinterpret_cast<uint16_t*>(memory + address) - 512; }

  alignas(16) char memory[kBytes];
  EmulatedGroupBlock block;
};

// The PTX ISA's examples of descriptors without swizzling, and its layouts of them in elements.
TEST(DescribedMatrix, LiesWherePtxsExamplesSay) {
  // MN-major, bf16: LBO 128 elements (encoded 16), SBO 64 (8); ((8,1,2),(8,2)):((1,8,64),(8,128)).
  const DescribedMatrix across(MatrixDescriptor(1024, 128 * 2, 64 * 2));
  EXPECT_EQ(MatrixDescriptor(1024, 128 * 2, 64 * 2), uint64_t{64} | uint64_t{16} << 16 | uint64_t{8} << 32);
  // K-major, tf32: LBO 64 elements (16), SBO 32 (8); ((8,2),(4,4)):((4,32),(1,64)). With 8 elements in 16
  // bytes instead of 4: ((8,2),(8,2)):((8,64),(1,128)).
  const DescribedMatrix along(MatrixDescriptor(1024, 64 * 4, 32 * 4));
  for (int i = 0; i < 16; ++i) {
    for (int depth = 0; depth < 16; ++depth) {
      EXPECT_EQ(across.MnMajor(i, depth), 1024 + 2 * (i % 8 + i / 8 * 64 + depth % 8 * 8 + depth / 8 * 128));
      EXPECT_EQ(along.KMajor(i, depth), 1024 + 2 * (i % 8 * 8 + i / 8 * 64 + depth % 8 + depth / 8 * 128));
    }
  }
}

// Where element `i` of a thread's parts stands, as the PTX ISA's figures of m64nNk16 number them.
int RowOfC(int t, int i) { return 16 * (t / 32) + t % 32 / 4 + (i % 4 < 2 ? 0 : 8); }
int ColumnOfC(int t, int i) { return 8 * (i / 4) + t % 4 * 2 + i % 2; }
int RowOfA(int t, int i) { return 16 * (t / 32) + t % 32 / 4 + ((i & 2) == 0 ? 0 : 8); }
int DepthOfA(int t, int i) { return t % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }

template <class Type>
uint16_t Stored(float x) {
  return static_cast<uint16_t>(Type::Pack(x, 0));
}

// Small whole numbers, so that products are exact.
struct Numbers {
  Numbers() {
    std::mt19937 random(1);
    for (auto* x : {&a[0][0], &b[0][0]}) {
      const int count = x == &a[0][0] ? 64 * 16 : 16 * kColumns;
      for (int i = 0; i < count; ++i) x[i] = static_cast<float>(static_cast<int>(random() % 17) - 8);
    }
  }
  float Product(int row, int column) const {
    float sum = 0;
    for (int d = 0; d < 16; ++d) sum += a[row][d] * b[d][column];
    return sum;
  }
  float a[64][16] = {};
  float b[16][kColumns] = {};
};

template <class Type>
void MultipliesAsPtxSays() {
  const Numbers n;
  EmulatedWarpgroups emulated(1);
  // a: core matrices of 8 rows and 8 of the depth; the next 8 rows 144 bytes on, the next depth 4096.
  constexpr int kA = 1024;
  constexpr int kKeys = 1024 + 1408;
  constexpr int kValues = 1024 + 8192;
  for (int row = 0; row < 64; ++row) {
    for (int d = 0; d < 16; ++d) {
      *(emulated.At(kA + row / 8 * 144 + d / 8 * 4096 + row % 8 * 16) + d % 8) = Stored<Type>(n.a[row][d]);
    }
  }
  for (int d = 0; d < 16; ++d) {
    for (int column = 0; column < kColumns; ++column) {
      *(emulated.At(kKeys + column / 8 * 128 + d / 8 * 1024 + column % 8 * 16) + d % 8) =
          Stored<Type>(n.b[d][column]);
      *(emulated.At(kValues + column / 8 * 272 + d / 8 * 128 + d % 8 * 16) + column % 8) =
          Stored<Type>(n.b[d][column]);
    }
  }
  std::vector<float[kColumns / 8][4]> c(kGroupThreads);
  std::vector<uint32_t[4]> a(kGroupThreads);
  for (int t = 0; t < kGroupThreads; ++t) {
    for (int i = 0; i < 8; i += 2) {
      a[t][i / 2] = Type::Pack(n.a[RowOfA(t, i)][DepthOfA(t, i)], n.a[RowOfA(t, i + 1)][DepthOfA(t, i + 1)]);
    }
  }
  const auto c_of = [&](int t) -> float(&)[kColumns / 8][4] { return c[t]; };
  const auto expect = [&](float factor) {
    for (int t = 0; t < kGroupThreads; ++t) {
      for (int i = 0; i < kColumns / 2; ++i) {
        EXPECT_EQ(c[t][i / 4][i % 4], factor * n.Product(RowOfC(t, i), ColumnOfC(t, i)));
      }
    }
  };
  emulated.block.Groups([&](const auto& group) {
    group.FenceRegisters();
    group.template MultiplyKeys<Type>(c_of, MatrixDescriptor(kA, 4096, 144),
                                      MatrixDescriptor(kKeys, 1024, 128), false);
    group.CommitProducts();
    EXPECT_TRUE(std::isnan(c[5][0][0]));
    group.template WaitForProducts<0>();
    expect(1);
    for (int i = 0; i < 2; ++i) {
      group.FenceRegisters();
      group.template MultiplyValues<Type>(
          [&](int t) {
            return GroupOperands<kColumns / 8>{c[t], a[t]};
          },
          MatrixDescriptor(kValues, 128, 272), true);
      group.CommitProducts();
    }
    group.template WaitForProducts<1>();
    EXPECT_TRUE(std::isnan(c[5][0][0]));  // One is still under way.
    group.template WaitForProducts<0>();
    expect(3);
  });
}

TEST(EmulatedWarpgroup, MultipliesAsPtxSays) {
  MultipliesAsPtxSays<Bf16>();
  MultipliesAsPtxSays<F16>();
}

// One group copies, the other waits.
TEST(EmulatedWarpgroup, BulkCopiesLandWhenTheyAreWaitedForAndNotBefore) {
  EmulatedWarpgroups emulated(2);
  alignas(16) const uint16_t from[8] = {1, 2, 3};
  auto* const barrier = reinterpret_cast<uint64_t*>(emulated.memory);
  emulated.block.InitBarrier(barrier, 1);
  emulated.block.Groups([&](const auto& group) {
    if (group.index() == 0) {
      emulated.block.Expect(barrier, 16);
      emulated.block.CopyBulk(emulated.memory + 64, from, 16, barrier);
      EXPECT_EQ(*emulated.At(1024 + 64), 0xffff);
      emulated.block.Arrive(barrier);
      EXPECT_EQ(*emulated.At(1024 + 64), 0xffff);
    } else {
      group.Wait(barrier, 1);  // Returns at once: no phase of this parity is under way.
      group.Wait(barrier, 0);
      EXPECT_EQ(*emulated.At(1024 + 64 + 4), 3);
    }
  });
}

TEST(EmulatedWarpgroup, StoresAndCopiesAreSeenWhenTheyWerePublished) {
  EmulatedWarpgroups emulated(1);
  const Load16 from = {{1, 2, 3, 4}};
  emulated.block.Store(7, emulated.memory, from);
  emulated.block.CopyAsync(7, emulated.memory + 16, &from, true);
  emulated.block.CommitCopies(7);
  emulated.block.WaitForCopies<0>(7);
  EXPECT_EQ(*emulated.At(1024), 0xffff);
  EXPECT_EQ(*emulated.At(1024 + 16), 0xffff);
  emulated.block.Publish(7);
  EXPECT_EQ(std::memcmp(emulated.memory, &from, 16), 0);
  EXPECT_EQ(std::memcmp(emulated.memory + 16, &from, 16), 0);
}

void Multiply(EmulatedWarpgroups& emulated, bool is_fenced, bool is_changed) {
  std::memset(emulated.memory, 0, sizeof(emulated.memory));
  std::vector<float[kColumns / 8][4]> c(kGroupThreads);
  emulated.block.Groups([&](const auto& group) {
    if (is_fenced) group.FenceRegisters();
    group.template MultiplyKeys<Bf16>([&](int t) -> float(&)[kColumns / 8][4] { return c[t]; },
                                      MatrixDescriptor(1024, 1024, 128), MatrixDescriptor(1024, 1024, 128),
                                      false);
    group.CommitProducts();
    if (is_changed) *emulated.At(1024) = 1;
    group.template WaitForProducts<0>();
  });
}

TEST(EmulatedWarpgroupDeathTest, WhatAGpuWouldNotForgiveEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EmulatedWarpgroups emulated(1);
  Multiply(emulated, true, false);
  EXPECT_DEATH(Multiply(emulated, false, false), "is_fenced_");
  EXPECT_DEATH(Multiply(emulated, true, true), "rows == product.rows");
  auto* const barrier = reinterpret_cast<uint64_t*>(emulated.memory);
  emulated.block.InitBarrier(barrier, 1);
  // Nobody will ever arrive.
  EXPECT_DEATH(emulated.block.Groups([&](const auto& group) { group.Wait(barrier, 0); }), "copies_.empty");
}

// The fewest slots still let a group wait while the slice before has not been given back.
TEST(WarpgroupSpace, HoldsEnoughSlotsOrLeavesItToAnotherWay) {
  for (int head_dim = 1; head_dim <= 1024; ++head_dim) {
    for (const int value_dim : {64, head_dim}) {
      const PageLayout layout = MakePageLayout(2, 1, head_dim, value_dim);
      for (const int64_t vectors : {1, 8, 9, 64, 65, 1000}) {
        for (const int terms : {1, 2}) {
          const int partial_tile = ChooseWarpgroupTile(layout, terms, vectors, false);
          EXPECT_TRUE(partial_tile > 0 || !TakesWarpgroups(layout)) << head_dim;
          for (const bool is_summed : {false, true}) {
            const int tile = ChooseWarpgroupTile(layout, terms, vectors, is_summed);
            EXPECT_LE(tile, partial_tile);
            if (tile == 0) continue;
            const WarpgroupSpace space = MakeWarpgroupSpace(layout, tile, terms, vectors, is_summed);
            EXPECT_GE(space.slots, kGroupSlotsMin) << head_dim;
            EXPECT_LE(space.bytes, kWarpgroupSharedMax) << head_dim;
          }
        }
      }
    }
  }
  const PageLayout usual = MakePageLayout(2, 8, 128, 128);
  EXPECT_EQ(ChooseWarpgroupTile(usual, 1, 65, true), 128);
  EXPECT_EQ(ChooseWarpgroupTile(usual, 2, 65, true), 64);
  EXPECT_EQ(ChooseWarpgroupTile(usual, 2, 65, false), 128);
  EXPECT_EQ(ChooseWarpgroupTile(usual, 1, 64, true), 64);
  const PageLayout wide = MakePageLayout(2, 8, 256, 256);
  EXPECT_EQ(ChooseWarpgroupTile(wide, 2, 8, true), 64);
  EXPECT_EQ(ChooseWarpgroupTile(wide, 1, 64, true), 0);
  EXPECT_EQ(ChooseWarpgroupTile(wide, 2, 65, false), 128);
  EXPECT_TRUE(TakesWarpgroups(MakePageLayout(2, 1, 512, 64)));
  EXPECT_FALSE(TakesWarpgroups(MakePageLayout(2, 1, 1024, 64)));
  EXPECT_FALSE(TakesWarpgroups(MakePageLayout(4, 1, 64, 64)));
}

template <class Type>
int TermsOf(const std::vector<float>& queries) {
  return QueryTerms<Type>(queries.data(), static_cast<int64_t>(queries.size()));
}

// One term is said to be enough only where the kernel's own splitting leaves nothing.
template <class Type>
void TermsAreWhatSplittingLeaves() {
  std::mt19937 random(1);
  int ones = 0;
  for (int i = 0; i < 20000; ++i) {
    // Two numbers of 9 to 12 digits, up to 2^40 apart, anywhere in a float's range.
    std::vector<float> query(2);
    const int digits = 8 + static_cast<int>(random() % 5);
    const int exponent = static_cast<int>(random() % 245) - 160;
    for (float& x : query) {
      const auto mantissa = static_cast<float>(random() % (1U << digits));
      x = std::ldexp(mantissa, exponent + static_cast<int>(random() % 40) - digits);
    }
    const float largest = std::max(query[0], query[1]);
    const float stretch = Type::kHasFloatRange ? 1 : FloatPowerOfTwo(StretchOf(largest));
    uint32_t high;
    uint32_t low;
    Split<Type>(query[0] * stretch, query[1] * stretch, high, low);
    if (TermsOf<Type>(query) == 2) continue;
    ++ones;
    EXPECT_EQ(low, 0U) << query[0] << " " << query[1];
  }
  EXPECT_GT(ones, 2000);
  EXPECT_EQ(TermsOf<Type>({0, 0, -0.0F}), 1);
  EXPECT_EQ(TermsOf<Type>({1, -1.5F, 0}), 1);
  EXPECT_EQ(TermsOf<Type>({1, 1 + 0x1p-12F}), 2);
  EXPECT_EQ(TermsOf<Type>({0x1p-140F, 0x1p-149F}), 2);
}
TEST(QueryTerms, AreOneForBf16WhereNothingIsLeft) {
  TermsAreWhatSplittingLeaves<Bf16>();
  EXPECT_EQ(TermsOf<Bf16>({0x1p100F, 0x1p-100F}), 1);
}
TEST(QueryTerms, AreOneForF16WhereNothingIsLeft) {
  TermsAreWhatSplittingLeaves<F16>();
  EXPECT_EQ(TermsOf<F16>({1, 0x1p-28F}), 1);
  EXPECT_EQ(TermsOf<F16>({1, 0x1p-29F}), 2);
  EXPECT_EQ(TermsOf<F16>({0x1p-100F, 0x1p-90F}), 2);  // Cannot be stretched so far.
}

}  // namespace
}  // namespace eduba::cuda
