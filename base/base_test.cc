#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "base/dtype.h"
#include "base/pages.h"
#include "base/parallel.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

TEST(DType, EveryF16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = F32FromF16(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(F32FromF16(F16FromF32(value))));
    } else {
      EXPECT_EQ(F16FromF32(value), half) << bits;
    }
  }
}

TEST(DType, EveryBf16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = F32FromBf16(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(F32FromBf16(Bf16FromF32(value))));
    } else {
      EXPECT_EQ(Bf16FromF32(value), half) << bits;
    }
  }
}

TEST(DType, HalfwayRoundsToEven) {
  EXPECT_EQ(F32FromBf16(Bf16FromF32(1.00390625f)), 1.0f);       // 1 + 2^-8: between 1 and 1 + 2^-7
  EXPECT_EQ(F32FromBf16(Bf16FromF32(1.01171875f)), 1.015625f);  // 1 + 3*2^-8: up to the even one
  EXPECT_EQ(F32FromF16(F16FromF32(2049.0f)), 2048.0f);
  EXPECT_EQ(F32FromF16(F16FromF32(2051.0f)), 2052.0f);
  EXPECT_EQ(F32FromF16(F16FromF32(std::ldexp(1.0f, -25))), 0.0f);  // half the smallest subnormal
  EXPECT_EQ(F32FromF16(F16FromF32(std::ldexp(1.5f, -24))), std::ldexp(2.0f, -24));
}

TEST(DType, BeyondTheRangeIsInfinity) {
  EXPECT_EQ(F32FromF16(F16FromF32(65519.0f)), 65504.0f);
  EXPECT_TRUE(std::isinf(F32FromF16(F16FromF32(65520.0f))));
  EXPECT_TRUE(std::isinf(F32FromBf16(Bf16FromF32(std::numeric_limits<float>::max()))));
}

TEST(Pages, RangesIntersect) {
  EXPECT_EQ((PositionRange{0, 10}.Intersect({5, 20})), (PositionRange{5, 10}));
  EXPECT_TRUE((PositionRange{0, 4}.Intersect({4, 8}).empty()));
  EXPECT_EQ(PageCount(0), 0);
  EXPECT_EQ(PageCount(256), 1);
  EXPECT_EQ(PageCount(257), 2);
}

TEST(ThreadPool, VisitsEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const int count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> visits(count);
      pool.ParallelFor(count, [&](int64_t i, int thread) {
        EXPECT_LT(thread, threads);
        ++visits[i];
      });
      for (const auto& visit : visits) EXPECT_EQ(visit.load(), 1);
    }
  }
}

// Threads that look for work before they sleep must neither miss a loop nor join in one twice.
TEST(ThreadPool, RunsManyShortLoopsOneAfterAnotherWithAndWithoutPauses) {
  ThreadPool pool(4);
  std::vector<int64_t> plain(8, 0);  // Not atomic: a loop's end orders it before the next.
  for (int loop = 0; loop < 3000; ++loop) {
    pool.ParallelFor(8, [&](int64_t i, int) { plain[i] += loop; });
    if (loop % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  for (const int64_t sum : plain) EXPECT_EQ(sum, 2999 * 3000 / 2);
}

}  // namespace
}  // namespace eduba
