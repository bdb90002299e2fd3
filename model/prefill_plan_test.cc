#include "model/prefill_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/visibility.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;

TEST(PrefillPlan, GivesEveryRankTheNextOfItsOwnStripes) {
  const int64_t stripe = 2 * kPageRows;
  // From the middle of rank 1's first stripe to the middle of its second.
  const auto plan = PlanPrefill({700, 100'000}, Placement::OfRanks(3, 2));
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->positions, (PositionRange{700, 4 * stripe}));
  EXPECT_THAT(plan->slices, ElementsAre(PositionRange{3 * stripe, 4 * stripe}, PositionRange{700, 2 * stripe},
                                        PositionRange{2 * stripe, 3 * stripe}));
  const auto rest = PlanPrefill({4 * stripe, 5 * stripe + 1}, Placement::OfRanks(3, 2));
  ASSERT_TRUE(rest.has_value());
  EXPECT_EQ(rest->positions, (PositionRange{4 * stripe, 5 * stripe + 1}));
  EXPECT_TRUE(rest->slices[0].empty());
  // The same stripes where stripe 0 is rank 2's.
  const auto later = PlanPrefill({700, 100'000}, Placement::OfRanks(3, 2, 2));
  ASSERT_TRUE(later.has_value());
  EXPECT_EQ(later->positions, plan->positions);
  EXPECT_THAT(later->slices, ElementsAre(plan->slices[1], plan->slices[2], plan->slices[0]));
}

TEST(PrefillPlan, IsNoneWhereOneRankWouldHaveAllRows) {
  EXPECT_FALSE(PlanPrefill({0, 2 * kPageRows}, Placement::OfRanks(3, 2)).has_value());
  EXPECT_TRUE(PlanPrefill({0, 2 * kPageRows + 1}, Placement::OfRanks(3, 2)).has_value());
  EXPECT_FALSE(PlanPrefill({0, 100'000}, Placement::OfRanks(1, 2)).has_value());
  EXPECT_FALSE(PlanPrefill({700, 700}, Placement::OfRanks(3, 2)).has_value());
}

// Position by position: who has a row after the exchange is who needs it, for what its rows see and for what
// every rank keeps.
TEST(PrefillPlan, EveryRankGetsExactlyTheRowsThatItNeedsAndHasTheirPages) {
  for (uint64_t seed = 1; seed <= 400; ++seed) {
    std::mt19937_64 random(seed);
    const auto pick = [&](auto... options) {
      const int64_t all[] = {static_cast<int64_t>(options)...};
      return all[random() % sizeof...(options)];
    };
    const int ranks = static_cast<int>(pick(2, 3, 4));
    const int64_t stripe_pages = pick(1, 2);
    const Placement placement =
        Placement::OfRanks(ranks, stripe_pages, static_cast<int64_t>(random() % ranks));
    const auto begin = static_cast<int64_t>(random() % 1500);
    const PositionRange left = {begin, begin + 300 + static_cast<int64_t>(random() % 2500)};
    LayerView view;
    LayerKeeping keeping;
    keeping.sink_tokens = view.sink_tokens = pick(0, 1, 4, 260, 900);
    if (random() % 3 > 0) {
      view.policy = Policy::kWindow;
      view.window = keeping.window = pick(1, 2, 40, 256, 257, 700, 2000);
      if (random() % 2 == 0) keeping.window += pick(1, 300);  // The other way to ask keeps more.
      keeping.owned = random() % 2 == 0;
    } else {
      keeping.owned = true;
      keeping.window = pick(0, 0, 40, 700);
    }
    const auto plan = PlanPrefill(left, placement);
    if (!plan) continue;
    const std::string problem =
        absl::StrCat("seed ", seed, ": ranks ", ranks, " stripe_pages ", stripe_pages, " block [",
                     plan->positions.begin, ", ", plan->positions.end, ") window ", view.window, " keeps ",
                     keeping.window, " sinks ", keeping.sink_tokens, " owned ", keeping.owned);
    for (int rank = 0; rank < ranks; ++rank) {
      const PositionRange own = plan->slices[rank];
      // What it should get of the others.
      std::set<int64_t> wanted;
      const auto want = [&](int64_t j) {
        if (j >= plan->positions.begin && j < plan->positions.end && (j < own.begin || j >= own.end)) {
          wanted.insert(j);
        }
      };
      for (int64_t j = 0; j < keeping.sink_tokens; ++j) want(j);
      for (int64_t j = std::max<int64_t>(0, plan->positions.end - keeping.window + 1);
           keeping.window > 0 && j < plan->positions.end; ++j) {
        want(j);
      }
      for (int64_t i = own.begin; view.policy == Policy::kWindow && i < own.end; ++i) {
        const Visibility sees = VisibleTo(view, i, plan->positions.end);
        for (int64_t j = sees.keys.begin; j < sees.keys.end; ++j) want(j);
      }
      std::vector<int64_t> got;
      for (int from = 0; from < ranks; ++from) {
        for (const PositionRange& range : RowsToSend(*plan, view, keeping, from, rank)) {
          EXPECT_EQ(range.Intersect(plan->slices[from]), range);
          for (int64_t j = range.begin; j < range.end; ++j) got.push_back(j);
        }
      }
      std::sort(got.begin(), got.end());
      ASSERT_EQ(got, std::vector<int64_t>(wanted.begin(), wanted.end())) << problem << " rank " << rank;

      const PrefillPages pages = PagesFor(*plan, view, keeping, placement, rank);
      std::set<int64_t> has(pages.kept.begin(), pages.kept.end());
      const int64_t fresh = PageCount(plan->positions.begin);
      for (int64_t page = fresh; page < PageCount(plan->positions.end); ++page) {
        // What KvPages::Drop leaves after a step of the same rows, and what a layer without a window takes
        // in.
        const bool dropped = page >= PageCount(keeping.sink_tokens) &&
                             PageBegin(page + 1) <= plan->positions.end - keeping.window + 1;
        const bool kept = keeping.window == 0
                              ? placement.Owns(rank, page) || page < PageCount(keeping.sink_tokens)
                              : !dropped || (keeping.owned && placement.Owns(rank, page));
        ASSERT_EQ(has.count(page) > 0, kept) << problem << " rank " << rank << " page " << page;
      }
      has.insert(pages.lent.begin(), pages.lent.end());
      EXPECT_EQ(has.size(), pages.kept.size() + pages.lent.size());
      for (const int64_t j : wanted) {
        ASSERT_TRUE(PageOf(j) < fresh || has.count(PageOf(j)) > 0)
            << problem << " rank " << rank << " row " << j;
      }
      for (int64_t j = own.begin; j < own.end; ++j) {
        ASSERT_TRUE(PageOf(j) < fresh || has.count(PageOf(j)) > 0)
            << problem << " rank " << rank << " row " << j;
      }
    }
  }
}

}  // namespace
}  // namespace eduba
