#include "collective/local/local_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

// What every transport promises is in tests/contract/communicator_test.cc; here is what only the hub has.
TEST(LocalHub, RefusesARankOutsideTheGroup) {
  LocalHub hub;
  EXPECT_EQ(hub.Join(1, 0, 2, 2, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(hub.Join(1, 0, -1, 2, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(hub.Join(1, 0, 0, 0, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(LocalHub, NamesTheRankThatDidNotJoin) {
  LocalHub hub;
  const absl::Status status = hub.Join(7, 3, 0, 2, absl::Now() + absl::Milliseconds(20)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("epoch 7, attempt 3"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 of 2"));
}

TEST(LocalHub, KeepsAttemptsAndEpochsApartAndForgetsThem) {
  LocalHub hub;
  auto first = hub.Join(1, 0, 0, 1, Soon());
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(hub.Join(1, 0, 0, 1, Soon()).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(hub.Join(1, 0, 1, 2, Soon()).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(hub.Join(1, 1, 0, 1, Soon()).ok());
  EXPECT_TRUE(hub.Join(2, 0, 0, 1, Soon()).ok());
  first->reset();
  EXPECT_TRUE(hub.Join(1, 0, 0, 1, Soon()).ok()) << "a group that all have left is forgotten";
}

TEST(LocalHub, CommunicatorsOutliveTheHub) {
  auto hub = std::make_unique<LocalHub>();
  std::vector<std::unique_ptr<Communicator>> ranks(2);
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] { ranks[r] = hub->Join(1, 0, r, 2, Soon()).value(); });
  }
  for (auto& thread : threads) thread.join();
  hub.reset();
  threads.clear();
  std::vector<std::vector<int64_t>> data = {{1, 2}, {10, 20}};
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back(
        [&, r] { EXPECT_EQ(ranks[r]->SumI64(absl::MakeSpan(data[r]), Soon()), absl::OkStatus()); });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(data[0], (std::vector<int64_t>{11, 22}));
  EXPECT_EQ(data[1], data[0]);
}

}  // namespace
}  // namespace eduba
