#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace eduba {
namespace {

TEST(Rope, DefaultFrequenciesAreAGeometricSeries) {
  const std::vector<double> frequencies = InverseFrequencies({Rope::Kind::kDefault, 10000, 8});
  ASSERT_EQ(frequencies.size(), 4u);
  for (int c = 0; c < 4; ++c) EXPECT_NEAR(frequencies[c], std::pow(10.0, -c), 1e-15);
}

TEST(Rope, LinearScalingDividesEveryFrequency) {
  const std::vector<double> plain = InverseFrequencies({Rope::Kind::kDefault, 1e6, 256});
  const std::vector<double> scaled = InverseFrequencies({Rope::Kind::kLinear, 1e6, 256, 8});
  for (size_t c = 0; c < plain.size(); ++c) EXPECT_EQ(scaled[c], plain[c] / 8);
}

// Llama-3.2-1B's; the three in between by the formula of transformers' _compute_llama3_parameters, in python.
TEST(Rope, Llama3KeepsShortWavelengthsAndStretchesLongOnes) {
  const std::vector<double> f = InverseFrequencies({Rope::Kind::kLlama3, 500000, 64, 32, 1, 4, 8192});
  const std::vector<double> plain = InverseFrequencies({Rope::Kind::kDefault, 500000, 64});
  ASSERT_EQ(f.size(), 32u);
  EXPECT_EQ(f[0], 1);
  for (int c = 0; c <= 14; ++c) EXPECT_EQ(f[c], plain[c]) << c;
  EXPECT_NEAR(f[15], 1.29054793e-3, 1e-11);
  EXPECT_NEAR(f[16], 4.29556797e-4, 1e-12);
  EXPECT_NEAR(f[17], 9.70828780e-5, 1e-13);
  for (int c = 18; c < 32; ++c) EXPECT_EQ(f[c], plain[c] / 32) << c;
}

}  // namespace
}  // namespace eduba
