#include "model/pooler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr int kDim = 5;
// The exponents of channels whose bounds are near, far and farther above what they hold, and of one channel
// that is always zero.
const std::vector<int16_t> kExponents = {2, 8, -20, 100, 0};

std::vector<float> States(uint64_t seed, int64_t rows) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> states(rows * kDim);
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < 4; ++c) {
      const float bounded = std::fmin(std::fmax(normal(random) + 0.5F, -3.9F), 3.9F);
      states[i * kDim + c] = std::ldexp(bounded, kExponents[c] - (c == 0 ? 2 : 6));
    }
  }
  return states;
}

TEST(Pooler, MeansAreThoseOfDoublesToTheLastBitButOne) {
  const int64_t rows = 300'000;
  const std::vector<float> states = States(1, rows);
  const std::vector<PositionRange> ranges = {{0, 1}, {1, 3}, {10, 266}, {300, 300 + (1 << 12)}, {5000, rows}};
  Pooler pooler = Pooler::Create(ranges, Pool::kMean, kExponents).value();
  pooler.Add(0, rows, states.data());
  const std::vector<float> got = pooler.Finish().value();
  for (size_t r = 0; r < ranges.size(); ++r) {
    for (int c = 0; c < kDim; ++c) {
      double sum = 0;
      for (int64_t i = ranges[r].begin; i < ranges[r].end; ++i) sum += states[i * kDim + c];
      const double wanted = sum / static_cast<double>(ranges[r].size());
      EXPECT_NEAR(got[r * kDim + c], wanted, std::abs(wanted) * std::ldexp(1, -23)) << r << ", " << c;
    }
  }
}

TEST(Pooler, PiecesAndRanksDoNotChangeABit) {
  const int64_t rows = 3000;
  const std::vector<float> states = States(2, rows);
  const std::vector<PositionRange> ranges = {{0, 7}, {7, 1500}, {1600, 1601}, {1999, 2001}, {2500, rows}};
  for (const Pool pool : {Pool::kMean, Pool::kLast}) {
    Pooler whole = Pooler::Create(ranges, pool, kExponents).value();
    whole.Add(0, rows, states.data());
    const std::vector<float> wanted = whole.Finish().value();
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      // Some alone, some as a prefill of which each of three ranks has every third piece.
      std::mt19937_64 random(seed);
      Pooler pooler = Pooler::Create(ranges, pool, kExponents).value();
      for (int64_t at = 0; at < rows;) {
        const int64_t count = std::min<int64_t>(rows - at, 1 + random() % 900);
        if (random() % 2 == 0) {
          pooler.Add(at, count, &states[at * kDim]);
          at += count;
          continue;
        }
        std::vector<Pooler> parts(3, pooler.Part({at, at + count}));
        const int64_t end = at + count;
        for (size_t rank = 0; at < end; ++rank) {
          const int64_t some = std::min<int64_t>(end - at, 1 + random() % 300);
          parts[rank % 3].Add(at, some, &states[at * kDim]);
          at += some;
        }
        for (size_t i = 0; i < parts[0].words().size(); ++i) {
          parts[0].words()[i] += parts[1].words()[i] + parts[2].words()[i];
        }
        pooler.AddPart(parts[0]);
      }
      const auto got = pooler.Finish();
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(*got, wanted) << "seed " << seed;
    }
  }
}

TEST(Pooler, NamesTheRangeThatIsWrongOrNotFull) {
  const auto refused = [](std::vector<PositionRange> ranges) {
    return std::string(Pooler::Create(std::move(ranges), Pool::kMean, kExponents).status().message());
  };
  EXPECT_THAT(refused({{5, 5}}), HasSubstr("range 0 is [5, 5)"));
  EXPECT_THAT(refused({{-1, 5}}), HasSubstr("range 0 is [-1, 5)"));
  EXPECT_THAT(refused({{5, 9}, {8, 10}}), HasSubstr("range 1 is [8, 10)"));
  const std::vector<float> states = States(3, 10);
  Pooler pooler = Pooler::Create({{0, 3}, {8, 12}}, Pool::kMean, kExponents).value();
  pooler.Add(0, 10, states.data());
  EXPECT_EQ(pooler.Finish().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(pooler.Finish().status().message()), HasSubstr("range 1 is [8, 12), but 2"));
}

}  // namespace
}  // namespace eduba
