#include "benchmarks/measure/attend.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace eduba {
namespace {

BenchOptions Small() {
  BenchOptions options;
  options.threads = 1;
  options.bytes = 1 << 20;
  options.rounds = 1;
  return options;
}

TEST(StreamBench, ReportsTheBytesAndTheirRate) {
  const auto result = RunStreamBench(Small());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->bytes, 1 << 20);
  EXPECT_EQ(result->threads, 1);
  EXPECT_FALSE(result->pattern.empty());
  EXPECT_DOUBLE_EQ(result->gb_per_s, 1e-9 * (1 << 20) / result->seconds);
}

TEST(AttendBench, PutsBatchesBesideTheFasterMatrixProduct) {
  int f32_calls = 0;
  const MatrixRates rates = {[&] { return 2.0 + f32_calls++ % 2; }, [] { return 8.0; }};
  const auto results = RunAttendBench(Small(), rates);
  ASSERT_TRUE(results.ok()) << results.status();
  for (const AttendResult& r : *results) {
    EXPECT_GT(r.seconds, 0);
    EXPECT_DOUBLE_EQ(r.share, r.gb_per_s / r.stream_gb_per_s);
    const bool batch = r.query_rows > 1;
    EXPECT_EQ(r.matrix_dtype, batch ? "bf16" : "");
    EXPECT_EQ(r.matrix_gflops, batch ? 8 : 0);
    if (batch) {
      EXPECT_DOUBLE_EQ(r.matrix_share, r.gflops / 8);
    }
  }
  EXPECT_TRUE(
      std::any_of(results->begin(), results->end(), [](const AttendResult& r) { return r.query_rows > 1; }));
}

TEST(AttendBench, TakesTheF32ProductOfChipsThatHaveNoOther) {
  const auto results = RunAttendBench(Small(), {[] { return 4.0; }, nullptr});
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->back().matrix_dtype, "f32");
  EXPECT_EQ(results->back().matrix_gflops, 4);
  EXPECT_EQ(results->back().matrix_bf16_gflops, 0);
}

TEST(MatrixRates, OwnProductsHaveARate) {
  const MatrixRates rates = OwnMatrixRates(1);
  EXPECT_GT(rates.f32(), 0);
  EXPECT_GT(rates.bf16(), 0);
}

}  // namespace
}  // namespace eduba
