#include "benchmarks/measure/merge.h"

#include <gtest/gtest.h>

namespace eduba {
namespace {

TEST(BenchMerge, TimesBothTransports) {
  for (const char* transport : {"local", "gloo"}) {
    for (const bool scatters : {false, true}) {
      const auto result = BenchMerge(
          {.transport = transport, .ranks = 3, .bytes = 1 << 20, .rounds = 5, .scatters = scatters});
      ASSERT_TRUE(result.ok()) << transport << ": " << result.status();
      EXPECT_GT(result->low_us, 0);
      EXPECT_LE(result->low_us, result->median_us);
      EXPECT_LE(result->median_us, result->high_us);
    }
  }
}

TEST(BenchMerge, RefusesWhatItCannotRun) {
  EXPECT_EQ(BenchMerge({.transport = "smoke"}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(BenchMerge({.ranks = 0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(BenchMerge({.bytes = 12}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(BenchMerge({.rounds = 0}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace eduba
