#include "kernels/cuda/emulated_block.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/page_attention.h"

namespace eduba::cuda {
namespace {

// Element `i` of a lane's part of each matrix, as the PTX ISA numbers them.
struct Place {
  int row;
  int column;
};
Place PlaceInA(int lane, int i) {  // 8 elements
  const bool upper = (i >= 0 && i < 2) || (i >= 4 && i < 6);
  return {upper ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place PlaceInB(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4};
}  // 4 elements
Place PlaceInC(int lane, int i) { return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1)}; }

struct Fragments {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};

// Small whole numbers, so that the product is exact.
template <class Type>
void MultipliesAsPtxSays() {
  std::mt19937 random(1);
  float a[16][16];
  float b[16][8];
  float c[16][8];
  const auto fill = [&](float* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<float>(static_cast<int>(random() % 17) - 8);
  };
  fill(&a[0][0], 256);
  fill(&b[0][0], 128);
  fill(&c[0][0], 128);
  std::vector<Fragments> lanes(kWarpThreads);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto a_of = [&](int i) { return a[PlaceInA(lane, i).row][PlaceInA(lane, i).column]; };
    const auto b_of = [&](int i) { return b[PlaceInB(lane, i).row][PlaceInB(lane, i).column]; };
    for (int i = 0; i < 4; ++i) lanes[lane].a[i] = Type::Pack(a_of(2 * i), a_of(2 * i + 1));
    for (int i = 0; i < 2; ++i) lanes[lane].b[i] = Type::Pack(b_of(2 * i), b_of(2 * i + 1));
    for (int i = 0; i < 4; ++i) lanes[lane].c[i] = c[PlaceInC(lane, i).row][PlaceInC(lane, i).column];
  }
  EmulatedWarp(0).Multiply<Type>([&](int lane) {
    return MatrixOperands{lanes[lane].c, lanes[lane].a, lanes[lane].b};
  });
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = PlaceInC(lane, i);
      float wanted = c[at.row][at.column];
      for (int d = 0; d < 16; ++d) wanted += a[at.row][d] * b[d][at.column];
      EXPECT_EQ(lanes[lane].c[i], wanted) << lane << " " << i;
    }
  }
}

TEST(EmulatedWarp, MultipliesAsPtxSays) {
  MultipliesAsPtxSays<Bf16>();
  MultipliesAsPtxSays<F16>();
}

TEST(EmulatedWarp, CutsOffWhatItCannotHold) {
  EXPECT_EQ(CutOff(1 + 0x1.8p-24), 1.0F);
  EXPECT_EQ(CutOff(-(1 + 0x1.ffp-24)), -1.0F);
  EXPECT_EQ(CutOff(1 + 0x1p-23), 1 + 0x1p-23F);
}

TEST(EmulatedWarp, LoadsTransposedMatricesAsPtxSays) {
  uint16_t matrix[4][8][8];
  for (int m = 0; m < 4; ++m) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) matrix[m][row][column] = 100 * m + 10 * row + column;
    }
  }
  uint32_t to[kWarpThreads][2][2];
  EmulatedWarp(0).LoadTransposed(
      [&](int lane) { return reinterpret_cast<const char*>(matrix[lane / 8][lane % 8]); },
      [&](int lane) -> uint32_t(&)[2][2] { return to[lane]; });
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const uint32_t word = to[lane][m / 2][m % 2];
      EXPECT_EQ(word & 0xffff, matrix[m][lane % 4 * 2][lane / 4]);
      EXPECT_EQ(word >> 16, matrix[m][lane % 4 * 2 + 1][lane / 4]);
    }
  }
}

TEST(EmulatedBlock, CopiesComeNeitherTooEarlyNorTooLate) {
  const EmulatedBlock block(0, 32, nullptr);
  const uint8_t from[16] = {1, 2, 3};
  uint8_t first[16] = {9};
  uint8_t second[16] = {9};
  block.CopyAsync(3, first, from, true);
  block.CommitCopies(3);
  block.CopyAsync(3, second, from, false);
  block.CommitCopies(3);
  EXPECT_EQ(first[0], 0xff);
  EXPECT_EQ(second[0], 0xff);
  block.WaitForCopies<1>(3);
  EXPECT_EQ(std::memcmp(first, from, sizeof(from)), 0);
  EXPECT_EQ(second[0], 0xff);
  block.WaitForCopies<0>(3);
  EXPECT_EQ(second[0], 0);
}

// Blocks of a rank add to one total in any order, and however much they add, and whether or not it wraps
// around, the flag says whether it is above the limit.
TEST(AddToTotal, FlagsTotalsAboveTheLimitAndNoOthers) {
  constexpr uint64_t kLimit = uint64_t{1} << 56;
  const auto flag_of = [](const std::vector<uint64_t>& sums) {
    uint64_t words[2] = {0, 0};
    for (const uint64_t sum : sums) AddToTotal(words, sum, false, kLimit);
    return words[1];
  };
  EXPECT_EQ(flag_of({}), 0U);
  EXPECT_EQ(flag_of({0, kLimit, 0}), 0U);
  EXPECT_EQ(flag_of(std::vector<uint64_t>(256, kLimit / 256)), 0U);
  EXPECT_EQ(flag_of({kLimit, 1}), 1U);
  EXPECT_EQ(flag_of({1, kLimit}), 1U);
  EXPECT_EQ(flag_of({kLimit + 1}), 1U);
  EXPECT_EQ(flag_of({3, 2 * kLimit, 4}), 1U);
  EXPECT_EQ(flag_of(std::vector<uint64_t>(256, kLimit)), 1U);  // Wraps around to 0.
  EXPECT_EQ(flag_of(std::vector<uint64_t>(300, kLimit)), 1U);
  uint64_t words[2] = {0, 0};
  AddToTotal(words, 5, true, kLimit);
  AddToTotal(words, kLimit, false, kLimit);
  EXPECT_EQ(words[1], kFault);
}

}  // namespace
}  // namespace eduba::cuda
