#include "collective/gloo/gloo_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "collective/map_rendezvous.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

// What every transport promises is in tests/contract/communicator_test.cc; here is what only connecting has.
TEST(ConnectGloo, RefusesARankOutsideTheGroup) {
  MapRendezvous store;
  EXPECT_EQ(ConnectGloo(2, 2, store, {}, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ConnectGloo(-1, 2, store, {}, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ConnectGloo(0, 0, store, {}, Soon()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ConnectGloo, RefusesAHostThatIsNotThisMachine) {
  MapRendezvous store;
  // 192.0.2.0/24 is set aside for documentation; a name with spaces has no address.
  for (const char* host : {"192.0.2.1", "no such host"}) {
    const absl::Status status = ConnectGloo(0, 2, store, {.host = host}, Soon()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(host));
  }
}

TEST(ConnectGloo, GivesUpAtTheDeadlineWhenARankNeverPublishes) {
  MapRendezvous store;
  const absl::Status status = ConnectGloo(0, 2, store, {}, absl::Now() + absl::Milliseconds(50)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
}

// A rendezvous store whose keeper is gone.
class BrokenRendezvous final : public Rendezvous {
 public:
  absl::Status Set(const std::string& /*key*/, const std::string& /*value*/,
                   absl::Time /*deadline*/) override {
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> Get(const std::string& /*key*/, absl::Time /*deadline*/) override {
    return absl::CancelledError("the store has gone");
  }
};

TEST(ConnectGloo, ReportsTheRendezvousOwnError) {
  BrokenRendezvous store;
  const absl::Status status = ConnectGloo(0, 2, store, {}, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the store has gone"));
}

TEST(ConnectGloo, RefusesAddressesOfAnotherSize) {
  MapRendezvous store;
  ASSERT_TRUE(store.Set("gloo/1", "00ff", Soon()).ok());
  const absl::Status status = ConnectGloo(0, 2, store, {}, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 published 2 bytes"));
}

TEST(ConnectGloo, WorksForOneRankWithoutANetwork) {
  BrokenRendezvous store;
  auto alone = ConnectGloo(0, 1, store, {.host = "no such host"}, Soon());
  ASSERT_TRUE(alone.ok()) << alone.status();
  std::vector<int64_t> data = {1, 2};
  EXPECT_EQ((*alone)->SumI64(absl::MakeSpan(data), Soon()), absl::OkStatus());
  EXPECT_EQ(data, (std::vector<int64_t>{1, 2}));
}

TEST(ConnectGloo, TwoRanksAddUp) {
  MapRendezvous store;
  std::vector<std::vector<int64_t>> data = {{1, 2}, {10, 20}};
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      auto c = ConnectGloo(r, 2, store, {}, Soon());
      ASSERT_TRUE(c.ok()) << c.status();
      EXPECT_EQ((*c)->SumI64(absl::MakeSpan(data[r]), Soon()), absl::OkStatus());
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(data[0], (std::vector<int64_t>{11, 22}));
  EXPECT_EQ(data[1], data[0]);
}

}  // namespace
}  // namespace eduba
