#include "kernels/portable_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "gtest/gtest.h"

namespace eduba {
namespace {

constexpr int kSamples = 1'000'000;

// In units of the last place of what is wanted; long double has 11 bits more, or 60.
double Ulps(double x, long double wanted) {
  const double nearest = static_cast<double>(wanted);
  const double ulp =
      std::nextafter(std::abs(nearest), std::numeric_limits<double>::infinity()) - std::abs(nearest);
  return static_cast<double>(std::abs(x - wanted) / static_cast<long double>(ulp));
}

TEST(PortableMath, ExpIsWithinFiveQuartersOfAnUlp) {
  std::mt19937_64 random(1);
  double worst = 0;
  for (const double size : {1e-9, 0.5, 5.0, 708.0}) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for (int i = 0; i < kSamples; ++i) {
      const double x = uniform(random);
      worst = std::max(worst, Ulps(PortableExp(x), std::exp(static_cast<long double>(x))));
    }
  }
  RecordProperty("worst_ulps", std::to_string(worst));
  EXPECT_LE(worst, 1.25);
  EXPECT_EQ(PortableExp(0), 1);
  EXPECT_EQ(PortableExp(-709), 0);
  EXPECT_EQ(PortableExp(-std::numeric_limits<double>::infinity()), 0);
  EXPECT_TRUE(std::isnan(PortableExp(std::numeric_limits<double>::quiet_NaN())));
}

TEST(PortableMath, LogIsWithinOneUlp) {
  std::mt19937_64 random(2);
  double worst = 0;
  const auto check = [&](double x) {
    worst = std::max(worst, Ulps(PortableLog(x), std::log(static_cast<long double>(x))));
  };
  std::uniform_real_distribution<double> near_one(0.5, 2);
  std::uniform_real_distribution<double> tiny(-1e-6, 1e-6);
  std::uniform_real_distribution<double> power(-1022, 1023);
  for (int i = 0; i < kSamples; ++i) {
    check(near_one(random));
    check(1 + tiny(random));
    check(std::exp2(power(random)));
  }
  check(std::numeric_limits<double>::min());
  check(std::numeric_limits<double>::max());
  RecordProperty("worst_ulps", std::to_string(worst));
  EXPECT_LE(worst, 1);
  EXPECT_EQ(PortableLog(1), 0);
}

TEST(PortableMath, TanhIsWithin4e16) {
  std::mt19937_64 random(3);
  double worst = 0;
  for (const double size : {0.1, 1.0, 20.0, 400.0}) {
    std::uniform_real_distribution<double> uniform(-size, size);
    for (int i = 0; i < kSamples; ++i) {
      const double x = uniform(random);
      worst = std::max(
          worst, static_cast<double>(std::abs(PortableTanh(x) - std::tanh(static_cast<long double>(x)))));
    }
  }
  RecordProperty("worst", std::to_string(worst * 1e16));
  EXPECT_LE(worst, 4e-16);
}

}  // namespace
}  // namespace eduba
