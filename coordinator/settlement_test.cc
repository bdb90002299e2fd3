#include "coordinator/settlement.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// 600 positions on two nodes in stripes of one page: pages 0 and 2 on node 0, page 1 on node 1.
SessionRecord Tensor() {
  SessionRecord record;
  record.id = 2;
  record.spec.set_layers(1);
  record.spec.set_kv_heads(1);
  record.spec.set_value_dim(1);
  record.placement = Placement::OfRanks(2, 1);
  record.appends = {{0, 500, {10, 1}}, {500, 100, {5, 0}}};
  return record;
}

v1::SessionContent Holds(int64_t length, uint64_t low, uint64_t high = 0) {
  v1::SessionContent content;
  content.set_length(length);
  content.set_digest_low(low);
  content.set_digest_high(high);
  content.mutable_sealed()->set_exponents(std::string("\0\0", 2));
  return content;
}

v1::SessionContent Sealed(int64_t length, int64_t count, uint64_t low, const std::string& exponents) {
  v1::SessionContent content = Holds(length, 1);
  content.set_sealed_count(count);
  content.mutable_sealed()->set_digest_low(low);
  content.mutable_sealed()->set_exponents(exponents);
  return content;
}

TEST(Settlement, RanksThatHoldTheRecordAreWhole) {
  const Settlement settlement = Settle(Tensor(), {Holds(600, 7, 1), Holds(600, 8)});
  EXPECT_EQ(settlement.why_lost, "");
  EXPECT_EQ(settlement.length, 600);
  EXPECT_EQ(settlement.exponents, "");
}

TEST(Settlement, ARankThatDidNotPublishPublishesWithTheExponentsOfAll) {
  v1::SessionContent published = Holds(600, 7, 1);
  published.mutable_sealed()->set_exponents(std::string("\3\0", 2));
  for (const auto& sealed : {std::string("\2\0", 2), std::string("\xfe\xff", 2)}) {
    const Settlement settlement = Settle(Tensor(), {published, Sealed(500, 100, 8, sealed)});
    EXPECT_EQ(settlement.why_lost, "");
    EXPECT_EQ(settlement.length, 600);
    EXPECT_EQ(settlement.exponents, std::string("\3\0", 2));
  }
  const Settlement larger = Settle(Tensor(), {published, Sealed(500, 100, 8, std::string("\7\0", 2))});
  EXPECT_EQ(larger.exponents, std::string("\7\0", 2));
  // Without the others' exponents nobody may publish: their answers would differ.
  published.mutable_sealed()->clear_exponents();
  EXPECT_THAT(Settle(Tensor(), {published, Sealed(500, 100, 8, std::string("\2\0", 2))}).why_lost,
              HasSubstr("last append"));
}

TEST(Settlement, ASealedAppendThatIsNotOnRecordIsDropped) {
  v1::SessionContent ahead = Holds(600, 7, 1);
  ahead.set_sealed_count(50);
  const Settlement settlement = Settle(Tensor(), {ahead, Holds(600, 8)});
  EXPECT_EQ(settlement.why_lost, "");
  EXPECT_EQ(settlement.length, 600);
  EXPECT_EQ(settlement.exponents, "");
}

TEST(Settlement, WhatANodeLacksIsLostByItsStripes) {
  for (const v1::SessionContent& lacks :
       {Holds(0, 0), Holds(500, 8), Sealed(500, 99, 8, std::string(2, '\0')), Holds(700, 8)}) {
    const Settlement settlement = Settle(Tensor(), {lacks, Holds(600, 8)});
    EXPECT_THAT(settlement.lost, ElementsAre(LostStripes{"node-0000", 2, 256 + 88}));
    EXPECT_THAT(settlement.why_lost, HasSubstr("node node-0000 does not hold its part, with 2 of 3 stripes"));
  }
  const Settlement other_rows = Settle(Tensor(), {Holds(600, 7, 1), Holds(600, 9)});
  EXPECT_EQ(other_rows.lost.size(), 2);
  EXPECT_THAT(other_rows.why_lost, HasSubstr("other rows"));
}

TEST(Settlement, NodesThatAreNotThereAreNamed) {
  const Settlement settlement = SettleWithout(Tensor(), {"node-0001"});
  EXPECT_THAT(settlement.lost, ElementsAre(LostStripes{"node-0001", 1, 256}));
  EXPECT_THAT(settlement.why_lost, HasSubstr("node node-0001 is not in the group"));
  EXPECT_THAT(SettleWithout(Tensor(), {}).why_lost, HasSubstr("node-0000, node-0001"));
  SessionRecord old = Tensor();
  old.placement = {};
  EXPECT_THAT(SettleWithout(old, {}).why_lost, HasSubstr("earlier release"));
}

TEST(Settlement, AModelsRanksGoOnTogetherOrGoBack) {
  SessionRecord record = Tensor();
  record.spec.mutable_model();
  record.appends = {{0, 600, {}}};
  const Settlement together = Settle(record, {Holds(650, 3), Holds(650, 3)});
  EXPECT_EQ(together.length, 650);
  EXPECT_FALSE(together.read_again);
  for (const v1::SessionContent& other : {Holds(600, 3), Holds(650, 4), Holds(651, 3)}) {
    const Settlement back = Settle(record, {Holds(650, 3), other});
    EXPECT_EQ(back.why_lost, "");
    EXPECT_EQ(back.length, 600);
    EXPECT_TRUE(back.read_again);
  }
  EXPECT_THAT(Settle(record, {Holds(650, 3), Holds(599, 3)}).why_lost, HasSubstr("node-0001"));
  EXPECT_EQ(Settle(record, {Holds(599, 3), Holds(599, 3)}).lost.size(), 2);
}

}  // namespace
}  // namespace eduba
