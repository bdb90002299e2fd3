#include "kernels/merge_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/merging_step.h"

namespace eduba {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<MergeKernels> AllTargets() {
  std::vector<MergeKernels> all;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) all.push_back(MergeKernelsFor(target));
  return all;
}

// Counts of channels around the widths of vectors.
constexpr int kCounts[] = {1, 2, 3, 7, 8, 9, 10, 16, 21, 64, 130};

TEST(MergeKernels, FinaliseIsItsDefinitionBitForBitOnEveryTarget) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal(0, 1);
  for (const int count : kCounts) {
    for (const int sinks : {0, 1, 2, 4, 5}) {
      for (const bool has_words : {false, true}) {
        const int64_t stride = count + 3;
        std::vector<int64_t> words;
        std::vector<double> units;
        std::vector<double> sink_weights(sinks);
        std::vector<float> sink_values(sinks * stride);
        for (int c = 0; c < count; ++c) {
          words.push_back(static_cast<int64_t>(random()) >> random() % 62);
          units.push_back(std::ldexp(1.0, static_cast<int>(random() % 120) - 20));
        }
        for (double& weight : sink_weights) weight = std::exp(normal(random));
        for (float& value : sink_values) value = normal(random);
        // Pairs of sinks nearly cancel: what is left shows how double was rounded, and in which order.
        for (int t = 1; t < sinks; t += 2) {
          sink_weights[t] = sink_weights[t - 1] * (1 + 0x1p-40 * normal(random));
          for (int c = 0; c < count; ++c) sink_values[t * stride + c] = -sink_values[(t - 1) * stride + c];
        }
        std::vector<float> out(count);
        FinaliseCall call;
        call.count = count;
        call.words = has_words ? words.data() : nullptr;
        call.units = units.data();
        call.weight = 0.3;
        call.sinks = sinks;
        call.sink_weights = sink_weights.data();
        call.sink_values = sink_values.data();
        call.sink_stride = stride;
        call.total = 7.7;
        call.out = out.data();
        for (const MergeKernels& kernels : AllTargets()) {
          kernels.finalise(call);
          for (int c = 0; c < count; ++c) {
            double sum = has_words ? call.weight * (static_cast<double>(words[c]) / units[c]) : 0;
            for (int t = 0; t < sinks; ++t) sum += sink_weights[t] * sink_values[t * stride + c];
            ASSERT_EQ(out[c], static_cast<float>(sum / call.total)) << count << " " << c;
          }
        }
      }
    }
  }
}

TEST(MergeKernels, SumSquaresIsItsDefinitionBitForBitOnEveryTarget) {
  std::mt19937_64 random(2);
  for (const int count : kCounts) {
    for (int round = 0; round < 20; ++round) {
      // The numbers are of one size, so that every rounding counts.
      std::vector<int64_t> words;
      std::vector<double> units;
      double lanes[8] = {};
      for (int c = 0; c < count; ++c) {
        words.push_back(static_cast<int64_t>(random()) >> random() % 3);
        units.push_back(std::ldexp(1.0, 40 + static_cast<int>(random() % 2)));
        const double x = static_cast<double>(words[c]) / units[c];
        const double square = x * x;
        lanes[c % 8] += square;
      }
      const double wanted =
          ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
      for (const MergeKernels& kernels : AllTargets()) {
        ASSERT_EQ(kernels.sum_squares(words.data(), units.data(), count), wanted) << count;
      }
    }
  }
}

TEST(MergeKernels, MaximumUnitsHoldEveryPageAndAreTheSameOnEveryTarget) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<float> uniform(-80, 80);
  constexpr int kFractionBits = 50;
  constexpr double kLeast = -70;  // Some are below it, and some above `most`.
  for (const int count : kCounts) {
    std::vector<double> most(count);
    for (int c = 0; c < count; ++c) most[c] = 60 + c % 30;
    // Where logits are large, fp32 has few digits left for what their differences are.
    for (const float m : {0.0F, -3.5F, 71.0F, -3e4F, 1e6F, kInfinity, -kInfinity, std::nanf("")}) {
      std::vector<float> magnitudes(count);
      for (float& magnitude : magnitudes) {
        magnitude = random() % 8 == 0 ? -kInfinity : (std::isfinite(m) ? m : 0) + uniform(random);
      }
      if (count > 5) magnitudes[5] = kInfinity;
      if (count > 6) magnitudes[6] = std::nanf("");
      std::vector<double> first;
      for (const MergeKernels& kernels : AllTargets()) {
        std::vector<double> units(count);
        kernels.maximum_units(m, magnitudes.data(), count, kFractionBits, kLeast, most.data(), units.data());
        if (first.empty()) first = units;
        ASSERT_EQ(std::memcmp(units.data(), first.data(), count * sizeof(double)), 0);
      }
      for (int c = 0; c < count; ++c) {
        const double exponent = kFractionBits - std::log2(first[c]);
        ASSERT_EQ(exponent, std::round(exponent));
        if (!std::isfinite(m) || std::isnan(magnitudes[c]) || magnitudes[c] == kInfinity) {
          EXPECT_EQ(exponent, most[c]);
        } else if (magnitudes[c] == -kInfinity) {
          EXPECT_EQ(exponent, kLeast);
        } else {
          // What was rounded to fp32 may have been larger, or M' smaller.
          const double largest = (static_cast<double>(std::nextafter(magnitudes[c], kInfinity)) -
                                  std::nextafter(m, -kInfinity)) /
                                 std::log(2.0);
          const double slack = 0x1p-20 * (std::abs(m) + std::abs(magnitudes[c]));
          EXPECT_GE(exponent, std::clamp(largest, kLeast, most[c]));
          EXPECT_LE(exponent, std::clamp(largest + 1.001 + slack, kLeast, most[c]));
        }
      }
    }
  }
}

// A page far below M' with large values, or the other way round: fp32 keeps little of the sum of the two,
// which is small.
TEST(MergeKernels, MaximumUnitsHoldAPageWhoseTwoPartsCancel) {
  const std::vector<double> most(1, 900.0);
  for (int power = -125; power <= 127; ++power) {
    const float o = std::nextafter(std::ldexp(1.0F, power), 0.0F);
    for (int above = -3; above <= 3; ++above) {
      // |o| exp(m) is 2^above, or a little more.
      const auto m = std::nextafter(static_cast<float>((above - power) * std::log(2.0)), kInfinity);
      const float magnitude = LogMagnitude(m, o);
      double unit = 0;
      BestMergeKernels().maximum_units(0, &magnitude, 1, 0, -900, most.data(), &unit);
      EXPECT_GE(-std::log2(unit), std::log2(static_cast<double>(o)) + m / std::log(2.0))
          << power << " " << above;
    }
  }
}

}  // namespace
}  // namespace eduba
