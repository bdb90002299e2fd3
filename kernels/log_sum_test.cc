#include "kernels/log_sum.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/row_kernels.h"

namespace eduba {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double Definition(const std::vector<float>& x) {
  double largest = -std::numeric_limits<double>::infinity();
  for (const float value : x) largest = std::max<double>(largest, value);
  if (std::isinf(largest)) return largest;
  double sum = 0;
  for (const float value : x) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

std::vector<float> RandomRow(uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t counts[] = {1, 2, 15, 16, 17, 255, 256, 257, 1000, 26535};
  const float sizes[] = {0, 0.1F, 1, 10, 100, 1e6F};
  std::vector<float> x(counts[random() % std::size(counts)]);
  std::normal_distribution<float> normal(0, 1);
  const float size = sizes[random() % std::size(sizes)];
  for (float& value : x) value = random() % 50 == 0 ? -kInfinity : size * normal(random);
  return x;
}

TEST(LogSumExp, MatchesItsDefinitionAndIsTheSameForAllTargetsThatFuse) {
  std::vector<LogSumFunction> functions[2];  // Without and with fused multiply-add.
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    for (const std::string& name : CpuTargets()) {
      if (name == hwy::TargetName(target)) functions[CpuTargetHasFma(name)].push_back(LogSumFor(target));
    }
  }
  ASSERT_EQ(functions[0].size() + functions[1].size(), CpuTargets().size());
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(seed);
    const std::vector<float> x = RandomRow(seed);
    const double wanted = Definition(x);
    for (const auto& kind : functions) {
      for (const LogSumFunction function : kind) {
        const double got = function(x.data(), static_cast<int64_t>(x.size()));
        if (std::isinf(wanted)) {
          ASSERT_EQ(got, wanted);
        } else {
          ASSERT_NEAR(got, wanted, 1e-6 * std::max(1.0, std::abs(wanted) * 1e-6));
        }
        ASSERT_EQ(got, kind[0](x.data(), static_cast<int64_t>(x.size())));
      }
    }
  }
}

TEST(LogSumExp, AnswersWhatIsNotFinite) {
  EXPECT_EQ(LogSumExp({-kInfinity, -kInfinity}), -kInfinity);
  EXPECT_EQ(LogSumExp({1, kInfinity}), kInfinity);
  EXPECT_TRUE(std::isnan(LogSumExp({1, std::nanf(""), 2})));
}

// Workers of one process take their kernels at the same time.
TEST(ForTarget, GivesEachThreadTheTargetThatItAskedFor) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  std::vector<LogSumFunction> wanted;
  wanted.reserve(targets.size());
  for (const int64_t target : targets) wanted.push_back(LogSumFor(target));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 20000; ++i) {
        const size_t which = (t + i) % targets.size();
        wrong += LogSumFor(targets[which]) != wanted[which];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace eduba
