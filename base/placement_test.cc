#include "base/placement.h"

#include <map>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

TEST(Placement, EveryPageHasOneOwnerAndStripesGoRoundTheNodes) {
  for (const int64_t first : {0, 1, 2}) {
    const Placement placement = Placement::OfRanks(3, 2, first);
    ASSERT_TRUE(placement.Validate().ok());
    for (int64_t page = 0; page < 40; ++page) {
      int owners = 0;
      for (int node = 0; node < 3; ++node) owners += placement.Owns(node, page) ? 1 : 0;
      EXPECT_EQ(owners, 1);
      EXPECT_EQ(placement.OwnerOf(page), (page / 2 + first) % 3);
      EXPECT_EQ(placement.OwnersOf(page), std::vector<int>{placement.OwnerOf(page)});
    }
  }
}

TEST(Placement, ReplicasAreDistinctNodesAndTheOwnerComesFirst) {
  Placement placement = Placement::OfRanks(5, 1, 4);
  placement.replicas = 3;
  ASSERT_TRUE(placement.Validate().ok());
  for (int64_t page = 0; page < 11; ++page) {
    const std::vector<int> owners = placement.OwnersOf(page);
    EXPECT_EQ(owners[0], placement.OwnerOf(page));
    EXPECT_EQ(std::set<int>(owners.begin(), owners.end()).size(), 3U);
  }
}

TEST(Placement, PartsOfARangeTileIt) {
  for (const int ranks : {1, 2, 3, 7}) {
    for (const int64_t first : {0, ranks - 1}) {
      const Placement placement = Placement::OfRanks(ranks, 2, first);
      for (const PositionRange range : {PositionRange{0, 1}, {0, 512}, {511, 513}, {100, 100}, {700, 9001}}) {
        const std::vector<OwnedRange> parts = OwnersOfRange(placement, range);
        EXPECT_LE(static_cast<int64_t>(parts.size()), OwnersOfRangeBound(placement, range));
        int64_t next = range.begin;
        for (const OwnedRange& part : parts) {
          EXPECT_EQ(part.range.begin, next);
          for (int64_t page = PageOf(part.range.begin); page < PageCount(part.range.end); ++page) {
            EXPECT_EQ(placement.OwnerOf(page), part.owner);
          }
          next = part.range.end;
        }
        EXPECT_EQ(next, range.end);
      }
    }
  }
}

TEST(Placement, StripesOfAllNodesAreAllStripes) {
  for (const int64_t first : {0, 2}) {
    const Placement placement = Placement::OfRanks(3, 4, first);
    for (const int64_t length : {0, 1, 1024, 1025, 20'000}) {
      std::map<int64_t, int> owner;
      int64_t busiest = 0;
      for (int node = 0; node < 3; ++node) {
        int64_t pages = 0;
        for (const int64_t stripe : StripesOwnedBy(placement, node, length)) {
          EXPECT_TRUE(owner.emplace(stripe, node).second);
          EXPECT_EQ(placement.OwnerOfStripe(stripe), node);
          pages += std::min<int64_t>(4, PageCount(length) - stripe * 4);
        }
        busiest = std::max(busiest, pages);
      }
      EXPECT_EQ(static_cast<int64_t>(owner.size()), (PageCount(length) + 3) / 4);
      EXPECT_LE(busiest, PagesOfBusiestOwner(placement, length));
    }
  }
}

TEST(Placement, ANodeIsFoundByName) {
  Placement placement;
  placement.nodes = {"a", "c", "d"};
  EXPECT_EQ(placement.IndexOf("c"), 1);
  EXPECT_EQ(placement.IndexOf("b"), -1);
  EXPECT_EQ(placement.IndexOf("e"), -1);
}

TEST(Placement, ValidateNamesWhatIsWrong) {
  const auto refused = [](auto change) {
    Placement placement = Placement::OfRanks(3);
    change(placement);
    return std::string(placement.Validate().message());
  };
  EXPECT_THAT(refused([](Placement& p) { p.nodes.clear(); }), ::testing::HasSubstr("0 nodes"));
  EXPECT_THAT(refused([](Placement& p) { p.nodes[2] = p.nodes[1]; }), ::testing::HasSubstr("distinct"));
  EXPECT_THAT(refused([](Placement& p) { p.replicas = 4; }), ::testing::HasSubstr("4 replicas"));
  EXPECT_THAT(refused([](Placement& p) { p.stripe_pages = 0; }), ::testing::HasSubstr("0 pages"));
  EXPECT_THAT(refused([](Placement& p) { p.first = 3; }), ::testing::HasSubstr("first node is 3"));
}

}  // namespace
}  // namespace eduba
