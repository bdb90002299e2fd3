#include "attention/visibility.h"

#include "gtest/gtest.h"

namespace eduba {
namespace {

// DESIGN's mask, token by token.
bool MaskSees(Policy policy, int64_t p, int64_t sink_tokens, int64_t window, int64_t j) {
  if (j > p) return false;
  return policy == Policy::kGlobal || j < sink_tokens || p - window < j;
}

TEST(Visibility, EqualsTheMaskTokenByToken) {
  constexpr int64_t kLength = 23;
  for (const Policy policy : {Policy::kGlobal, Policy::kWindow}) {
    for (int64_t sinks = 0; sinks <= kLength + 2; ++sinks) {
      for (int64_t window = 1; window <= kLength + 2; ++window) {
        for (int64_t p = -1; p < kLength; ++p) {
          const Visibility visible = VisibleTo({policy, sinks, window}, p, kLength);
          for (int64_t j = 0; j < kLength; ++j) {
            const bool in_keys = j >= visible.keys.begin && j < visible.keys.end;
            const bool in_sinks = j < visible.sinks;
            ASSERT_FALSE(in_keys && in_sinks) << "position " << j << " would count twice";
            ASSERT_EQ(in_keys || in_sinks, MaskSees(policy, p, sinks, window, j))
                << "p=" << p << " j=" << j << " sinks=" << sinks << " window=" << window;
            ASSERT_EQ(in_sinks, j < sinks && j <= p);
          }
        }
      }
    }
  }
}

TEST(Visibility, StopsAtTheLength) {
  const Visibility visible = VisibleTo({Policy::kGlobal, 4, 0}, 1000, 10);
  EXPECT_EQ(visible.keys, (PositionRange{4, 10}));
  EXPECT_EQ(visible.sinks, 4);
}

TEST(Visibility, ASequenceShorterThanItsSinksIsAllSinks) {
  const Visibility visible = VisibleTo({Policy::kWindow, 8, 4}, 2, 3);
  EXPECT_TRUE(visible.keys.empty());
  EXPECT_EQ(visible.sinks, 3);
}

}  // namespace
}  // namespace eduba
