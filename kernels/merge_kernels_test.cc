#include "kernels/merge_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"

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

TEST(MergeKernels, FoldIsItsDefinitionBitForBitOnEveryTarget) {
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
        FoldCall call;
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
          kernels.fold(call);
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

TEST(MergeKernels, SumSquaresIsTheSameOnEveryTarget) {
  std::mt19937_64 random(2);
  for (const int count : kCounts) {
    std::vector<int64_t> words;
    std::vector<double> units;
    double wanted = 0;
    for (int c = 0; c < count; ++c) {
      words.push_back(static_cast<int64_t>(random()) >> random() % 20);
      units.push_back(std::ldexp(1.0, 40 + static_cast<int>(random() % 4)));
      wanted += std::pow(static_cast<double>(words[c]) / units[c], 2);
    }
    const std::vector<MergeKernels> all = AllTargets();
    const double first = all[0].sum_squares(words.data(), units.data(), count);
    EXPECT_NEAR(first, wanted, 1e-14 * wanted);
    for (const MergeKernels& kernels : all) {
      ASSERT_EQ(kernels.sum_squares(words.data(), units.data(), count), first) << count;
    }
  }
}

TEST(MergeKernels, MaximumUnitsHoldEveryPageAndAreTheSameOnEveryTarget) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<float> uniform(-80, 80);
  constexpr int kFractionBits = 50;
  constexpr double kLeast = -900;
  for (const int count : kCounts) {
    const std::vector<double> most(count, 60.0);
    // Where logits are large, fp32 has few digits left for what their differences are.
    for (const float m : {0.0F, -3.5F, 71.0F, -3e4F, 1e6F, kInfinity, std::nanf("")}) {
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
          EXPECT_EQ(exponent, 60);
        } else if (magnitudes[c] == -kInfinity) {
          EXPECT_EQ(exponent, kLeast);
        } else {
          // What was rounded to fp32 may have been larger, or M' smaller.
          const double largest = (static_cast<double>(std::nextafter(magnitudes[c], kInfinity)) -
                                  std::nextafter(m, -kInfinity)) /
                                 std::log(2.0);
          const double slack = 0x1p-20 * (std::abs(m) + std::abs(magnitudes[c]));
          EXPECT_GE(exponent, std::min(60.0, largest));
          EXPECT_LE(exponent, std::min(60.0, largest + 1.001 + slack));
        }
      }
    }
  }
}

}  // namespace
}  // namespace eduba
