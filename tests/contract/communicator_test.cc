// One contract for every transport. What collective/communicator.h promises is asked here of each, with the
// same words.
#include "collective/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/broadcast.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/local/local_communicator.h"
#include "collective/map_rendezvous.h"
#include "collective/nccl/fake_nccl.h"
#include "collective/nccl/nccl_communicator.h"
#include "tests/contract/communicator_cases.h"
#include "tests/contract/communicator_checks.h"

namespace eduba {
namespace {

using ::testing::AnyOf;
using ::testing::Eq;
using ::testing::HasSubstr;

constexpr auto kOk = absl::StatusCode::kOk;
constexpr auto kAborted = absl::StatusCode::kAborted;
constexpr auto kDeadlineExceeded = absl::StatusCode::kDeadlineExceeded;
constexpr auto kInternal = absl::StatusCode::kInternal;
constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

using Join =
    std::function<absl::StatusOr<std::unique_ptr<Communicator>>(int rank, int size, absl::Time deadline)>;

// How the ranks of one new group join it.
struct Transport {
  const char* name;
  Join (*new_group)();
  const char* says;  // What transport() says.
  // Whether an error that came from a peer names its rank. NCCL does not know it.
  bool names_ranks = true;
};

Join NewLocalGroup() {
  return [hub = std::make_shared<LocalHub>()](int rank, int size, absl::Time deadline) {
    return hub->Join(/*epoch=*/1, /*attempt=*/0, rank, size, deadline);
  };
}

Join NewGlooGroup() {
  return [store = std::make_shared<MapRendezvous>()](int rank, int size, absl::Time deadline) {
    return ConnectGloo(rank, size, *store, GlooOptions(), deadline);
  };
}

// NCCL's way of working without NCCL: what runs of the nccl transport on a machine without GPUs.
Join NewFakeNcclGroup() {
  TheFakeNccl().Reset();
  return [store = std::make_shared<MapRendezvous>()](int rank, int size, absl::Time deadline) {
    return ConnectNcclForTest(rank, size, *store, FakeNcclParts(), deadline);
  };
}

// One device for each rank, because two ranks of a process cannot share one; tests/faults/ has ranks that are
// processes, and share one.
Join NewNcclGroup() {
  return [store = std::make_shared<MapRendezvous>()](int rank, int size, absl::Time deadline) {
    return ConnectNccl(rank, size, *store, {.device = rank}, deadline);
  };
}

void OnThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

using Group = std::vector<std::unique_ptr<Communicator>>;

Group Form(const Join& join, int size) {
  Group group(size);
  OnThreads(size, [&](int rank) {
    auto joined = join(rank, size, Far());
    EXPECT_TRUE(joined.ok()) << "rank " << rank << ": " << joined.status();
    if (joined.ok()) group[rank] = *std::move(joined);
  });
  return group;
}

class CommunicatorContract : public testing::TestWithParam<Transport> {
 protected:
  // Why this machine cannot have groups of so many ranks over the transport. Form is for no more.
  absl::Status Need(int ranks) {
    most_ranks_ = std::max(most_ranks_, ranks);
    if (GetParam().new_group != NewNcclGroup) return absl::OkStatus();
    absl::Status status = LoadNccl().status();
    if (status.ok()) status = OpenCudaStream(ranks - 1).status();
    return status;
  }
  // Those of `sizes` that it can have; says which it cannot.
  std::vector<int> Possible(const std::vector<int>& sizes) {
    std::vector<int> possible;
    for (const int ranks : sizes) {
      const absl::Status missing = Need(ranks);
      if (missing.ok()) {
        possible.push_back(ranks);
      } else {
        std::cout << "SKIPPED, NOT TESTED: nccl with " << ranks << " ranks: " << missing << "\n";
      }
    }
    return possible;
  }
  Group Form(int size) {
    EXPECT_LE(size, most_ranks_) << "the test does not say that it needs so many ranks";
    return eduba::Form(GetParam().new_group(), size);
  }

 private:
  int most_ranks_ = 0;
};

#define EDUBA_NEEDS_RANKS(count)                                                             \
  do {                                                                                       \
    const absl::Status missing = Need(count);                                                \
    if (!missing.ok()) {                                                                     \
      GTEST_SKIP() << "SKIPPED, NOT TESTED: nccl with " << (count) << " ranks: " << missing; \
    }                                                                                        \
  } while (false)

TEST_P(CommunicatorContract, KnowsWhoItIs) {
  EDUBA_NEEDS_RANKS(3);
  const Group group = Form(3);
  for (int r = 0; r < 3; ++r) {
    EXPECT_EQ(group[r]->rank(), r);
    EXPECT_EQ(group[r]->size(), 3);
    EXPECT_STREQ(group[r]->transport(), GetParam().says);
  }
}

// 64Ki + 1 words take the ways for large payloads, and divide by no group size but 1 and 5.
TEST_P(CommunicatorContract, SumsAndMaximaAreExactForEverySizeAndGroup) {
  EDUBA_NEEDS_RANKS(1);
  for (const int ranks : Possible({1, 2, 3, 5, 8})) {
    const Group group = Form(ranks);
    OnThreads(ranks, [&](int rank) {
      int64_t call = 0;
      for (const int64_t count : {0, 1, 2, 3, 1009, 65537}) {
        EXPECT_EQ(SumAndCheck(*group[rank], count, ++call, Far()), absl::OkStatus()) << ranks << " ranks";
        EXPECT_EQ(MaxAndCheck(*group[rank], count, ++call, Far()), absl::OkStatus()) << ranks << " ranks";
        for (const auto& parts : {UnevenParts(ranks, count), std::vector<int64_t>(ranks, count / ranks)}) {
          EXPECT_EQ(ScatterAndCheck(*group[rank], parts, ++call, Far()), absl::OkStatus())
              << ranks << " ranks";
        }
      }
    });
  }
}

TEST_P(CommunicatorContract, SumsPayloadsOfManyMebibytes) {
  EDUBA_NEEDS_RANKS(2);
  for (const int ranks : Possible({2, 3})) {
    const Group group = Form(ranks);
    OnThreads(ranks, [&](int rank) {
      EXPECT_EQ(SumAndCheck(*group[rank], 600'001, 1, Far()), absl::OkStatus()) << ranks << " ranks";
      EXPECT_EQ(ScatterAndCheck(*group[rank], UnevenParts(ranks, 1'500'001), 2, Far()), absl::OkStatus())
          << ranks << " ranks";
    });
  }
}

TEST_P(CommunicatorContract, SumsWrapAround) {
  EDUBA_NEEDS_RANKS(2);
  const int64_t largest = std::numeric_limits<int64_t>::max();
  const int64_t smallest = std::numeric_limits<int64_t>::min();
  const Group group = Form(2);
  const std::vector<std::vector<int64_t>> given = {{largest, smallest, largest, -1},
                                                   {1, smallest, largest, 1}};
  OnThreads(2, [&](int rank) {
    std::vector<int64_t> data = given[rank];
    EXPECT_EQ(group[rank]->SumI64(absl::MakeSpan(data), Far()), absl::OkStatus());
    EXPECT_EQ(data, (std::vector<int64_t>{smallest, 0, -2, 0}));
    data = given[rank];
    EXPECT_EQ(group[rank]->ReduceScatterI64(absl::MakeSpan(data), {1, 3}, Far()), absl::OkStatus());
    if (rank == 0) {
      EXPECT_EQ(data[0], smallest);
    } else {
      EXPECT_EQ(std::vector<int64_t>(data.begin() + 1, data.end()), (std::vector<int64_t>{0, -2, 0}));
    }
  });
}

TEST_P(CommunicatorContract, MaximaOfNegativesInfinitiesAndZerosAreExactToTheBit) {
  EDUBA_NEEDS_RANKS(3);
  const float infinity = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  const Group group = Form(3);
  const std::vector<std::vector<float>> given = {
      {-3.f, -infinity, -infinity, -0.f, 0.f, -0.f, -tiny, 1.f},
      {-2.f, -infinity, -1e38f, 0.f, -0.f, -0.f, -0.f, infinity},
      {-5.f, -infinity, -infinity, -0.f, -0.f, -0.f, -1.f, -infinity}};
  const std::vector<float> want = {-2.f, -infinity, -1e38f, 0.f, 0.f, -0.f, -0.f, infinity};
  OnThreads(3, [&](int rank) {
    std::vector<float> data = given[rank];
    EXPECT_EQ(group[rank]->MaxF32(absl::MakeSpan(data), Far()), absl::OkStatus());
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(std::bit_cast<uint32_t>(data[i]), std::bit_cast<uint32_t>(want[i]))
          << "rank " << rank << ", " << i;
    }
  });
}

TEST_P(CommunicatorContract, ABarrierHoldsEveryRankUntilTheLast) {
  EDUBA_NEEDS_RANKS(5);
  const int ranks = 5;
  const Group group = Form(ranks);
  std::atomic<int> arrived = 0;
  OnThreads(ranks, [&](int rank) {
    for (int round = 1; round <= 20; ++round) {
      ++arrived;
      EXPECT_EQ(group[rank]->Barrier(Far()), absl::OkStatus());
      EXPECT_GE(arrived, round * ranks);
      EXPECT_EQ(group[rank]->Barrier(Far()), absl::OkStatus());
    }
  });
}

// Every rank to every other one, each message of another size; the largest are cut by every transport.
TEST_P(CommunicatorContract, MessagesGoRoundTheRanksInEveryDistance) {
  EDUBA_NEEDS_RANKS(1);
  for (const int ranks : Possible({1, 2, 3, 4, 5})) {
    const Group group = Form(ranks);
    OnThreads(ranks, [&](int rank) {
      int64_t call = 0;
      for (const int64_t count : {0, 1, 1009, 9'000'001}) {
        for (int shift = 1; shift < ranks; ++shift) {
          const Route route = [=](int from) {
            return std::pair((from + shift) % ranks, count == 0 ? 0 : count + 4096 * from);
          };
          EXPECT_EQ(SendAndCheck(*group[rank], route, ++call, Far()), absl::OkStatus())
              << ranks << " ranks, " << count << " bytes, shift " << shift;
        }
      }
    });
  }
}

TEST_P(CommunicatorContract, AMessageNeedsNoneTheOtherWay) {
  EDUBA_NEEDS_RANKS(4);
  const Group group = Form(4);
  OnThreads(4, [&](int rank) {
    int64_t call = 0;
    const auto nobody = std::pair(-1, int64_t{0});
    // One to one; along a chain; to the one that sends to a third; nobody at all.
    for (const int64_t count : {int64_t{1}, int64_t{2'000'003}}) {
      for (const Route& route :
           {Route([&](int from) { return from == 2 ? std::pair(0, count) : nobody; }),
            Route([&](int from) { return from < 3 ? std::pair(from + 1, count + from) : nobody; }),
            Route([&](int from) { return from % 2 == 1 ? std::pair((from + 2) % 4, count) : nobody; }),
            Route([&](int /*from*/) { return nobody; })}) {
        EXPECT_EQ(SendAndCheck(*group[rank], route, ++call, Far()), absl::OkStatus()) << "call " << call;
      }
    }
  });
}

TEST_P(CommunicatorContract, ABroadcastReachesAllFromAny) {
  EDUBA_NEEDS_RANKS(1);
  for (const int ranks : Possible({1, 2, 3, 4, 5, 7})) {
    const Group group = Form(ranks);
    OnThreads(ranks, [&](int rank) {
      for (int from = 0; from < ranks; ++from) {
        for (const size_t count : {size_t{1}, size_t{70'001}}) {
          std::vector<char> data(count, static_cast<char>(rank));
          EXPECT_EQ(Broadcast(*group[rank], from, absl::MakeSpan(data), Far()), absl::OkStatus());
          EXPECT_EQ(data, std::vector<char>(count, static_cast<char>(from)))
              << rank << " of " << ranks << " from " << from;
        }
      }
    });
  }
}

TEST_P(CommunicatorContract, ABroadcastThatARankHasLeftIsAnError) {
  EDUBA_NEEDS_RANKS(4);
  Group group = Form(4);
  group[0].reset();
  OnThreads(3, [&](int i) {
    std::vector<char> data(5'000);
    EXPECT_FALSE(Broadcast(*group[i + 1], 0, absl::MakeSpan(data), Far()).ok()) << i + 1;
  });
}

TEST_P(CommunicatorContract, AMessageWhoseRankLeavesOrDoesNotComeIsAnError) {
  EDUBA_NEEDS_RANKS(3);
  Group group = Form(3);
  OnThreads(3, [&](int rank) {
    EXPECT_EQ(SendAndCheck(*group[rank], Ring(3, 1, 5'000), 1, Far()), absl::OkStatus());
    if (rank == 1) {
      group[1].reset();
      return;
    }
    const absl::Status status = SendAndCheck(*group[rank], Ring(3, 1, 5'000), 2, Far());
    EXPECT_EQ(status.code(), kUnavailable) << status;
  });
  group = Form(2);
  const absl::Time deadline = absl::Now() + absl::Milliseconds(100);
  EXPECT_EQ(SendAndCheck(*group[0], Ring(2, 1, 5'000), 1, deadline).code(), kDeadlineExceeded);
  EXPECT_EQ(SendAndCheck(*group[0], Ring(2, 1, 5'000), 2, Far()).code(), kAborted);
}

TEST_P(CommunicatorContract, KeepsManyMixedCallsInOrder) {
  EDUBA_NEEDS_RANKS(3);
  const uint32_t seed = 20240607;
  const int ranks = 3;
  const Group group = Form(ranks);
  OnThreads(ranks, [&](int rank) {
    std::mt19937 random(seed);  // The same sequence on every rank.
    for (int call = 0; call < 300; ++call) {
      const int kind = static_cast<int>(random() % 5);
      const int64_t count = random() % 8 == 0 ? random() % 20'000 : random() % 200;
      const absl::Status status = kind == 0   ? SumAndCheck(*group[rank], count, call, Far())
                                  : kind == 1 ? MaxAndCheck(*group[rank], count, call, Far())
                                  : kind == 2 ? SendAndCheck(*group[rank], Ring(ranks, 2, count), call, Far())
                                  : kind == 3
                                      ? ScatterAndCheck(*group[rank], UnevenParts(ranks, count), call, Far())
                                      : group[rank]->Barrier(Far());
      ASSERT_TRUE(status.ok()) << status << " (seed=" << seed << " call=" << call << " kind=" << kind
                               << " count=" << count;
    }
  });
}

TEST_P(CommunicatorContract, WaitsForEverWhenAskedTo) {
  EDUBA_NEEDS_RANKS(2);
  const Group group = Form(2);
  OnThreads(2, [&](int rank) {
    EXPECT_EQ(SumAndCheck(*group[rank], 10, 1, absl::InfiniteFuture()), absl::OkStatus());
    EXPECT_EQ(SumAndCheck(*group[rank], 10, 2, Far()), absl::OkStatus());
  });
}

TEST_P(CommunicatorContract, JoiningGivesUpWhenARankDoesNotCome) {
  EDUBA_NEEDS_RANKS(2);
  const Join join = GetParam().new_group();
  const absl::Time deadline = absl::Now() + absl::Milliseconds(100);
  OnThreads(2, [&](int rank) {
    EXPECT_EQ(join(rank, 3, deadline).status().code(), kDeadlineExceeded) << "rank " << rank;
    EXPECT_GE(absl::Now(), deadline);
  });
}

TEST_P(CommunicatorContract, ACallGivesUpAtItsDeadlineWhenARankDoesNotCome) {
  EDUBA_NEEDS_RANKS(3);
  const Group group = Form(3);
  const absl::Time deadline = absl::Now() + absl::Milliseconds(150);
  OnThreads(2, [&](int rank) {
    const absl::Status status = SumAndCheck(*group[rank], 100, 1, deadline);
    EXPECT_EQ(status.code(), kDeadlineExceeded) << status;
    EXPECT_GE(absl::Now(), deadline);
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank"));
  });
  // The others may have sent the late one all it needs, but then they left.
  EXPECT_THAT(SumAndCheck(*group[2], 100, 1, Far()).code(), AnyOf(Eq(kOk), Eq(kUnavailable)));
  EXPECT_THAT(SumAndCheck(*group[2], 100, 2, Far()).code(), AnyOf(Eq(kAborted), Eq(kUnavailable)));
}

TEST_P(CommunicatorContract, AReduceScatterGivesUpAtItsDeadlineOrWhenARankLeaves) {
  EDUBA_NEEDS_RANKS(3);
  const std::vector<int64_t> parts = {30'000, 10'000, 50'000};
  {
    const Group group = Form(3);
    const absl::Time deadline = absl::Now() + absl::Milliseconds(150);
    OnThreads(2, [&](int rank) {
      const absl::Status status = ScatterAndCheck(*group[rank], parts, 1, deadline);
      EXPECT_EQ(status.code(), kDeadlineExceeded) << status;
      EXPECT_GE(absl::Now(), deadline);
      EXPECT_THAT(std::string(status.message()), HasSubstr("rank"));
      EXPECT_EQ(ScatterAndCheck(*group[rank], parts, 2, Far()).code(), kAborted);
    });
  }
  Group group = Form(3);
  OnThreads(3, [&](int rank) {
    EXPECT_EQ(ScatterAndCheck(*group[rank], parts, 1, Far()), absl::OkStatus());
    if (rank == 1) {
      group[1].reset();
      return;
    }
    const absl::Status status = ScatterAndCheck(*group[rank], parts, 2, Far());
    EXPECT_EQ(status.code(), kUnavailable) << status;
  });
}

TEST_P(CommunicatorContract, AbortEndsTheCallUnderWay) {
  EDUBA_NEEDS_RANKS(3);
  const Group group = Form(3);  // Ranks 1 and 2 never call.
  std::atomic<bool> calling = false;
  std::thread aborter([&] {
    while (!calling) std::this_thread::yield();
    group[0]->Abort(absl::InternalError("epoch 4 is over"));
    group[0]->Abort(absl::InternalError("said twice"));
  });
  calling = true;
  const absl::Status status = group[0]->Barrier(Far());
  aborter.join();
  EXPECT_EQ(status.code(), kAborted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("epoch 4 is over"));
}

TEST_P(CommunicatorContract, AbortBetweenCallsEndsTheNextOnEveryRank) {
  EDUBA_NEEDS_RANKS(3);
  const Group group = Form(3);
  OnThreads(3, [&](int rank) { EXPECT_EQ(group[rank]->Barrier(Far()), absl::OkStatus()); });
  group[0]->Abort(absl::CancelledError("draining"));
  OnThreads(3, [&](int rank) {
    const absl::Status status = SumAndCheck(*group[rank], 5, 1, Far());
    EXPECT_EQ(status.code(), rank == 0 ? kAborted : kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(rank == 0                ? "draining"
                                                         : GetParam().names_ranks ? "rank 0"
                                                                                  : "a rank"));
  });
}

TEST_P(CommunicatorContract, ARankThatLeavesEndsTheCallOfTheOthers) {
  EDUBA_NEEDS_RANKS(3);
  Group group = Form(3);
  std::atomic<int> calling = 0;
  OnThreads(3, [&](int rank) {
    if (rank == 1) {
      while (calling < 2) std::this_thread::yield();
      group[1].reset();
      return;
    }
    ++calling;
    const absl::Status status = SumAndCheck(*group[rank], 100, 1, Far());
    EXPECT_EQ(status.code(), kUnavailable) << status;
  });
}

TEST_P(CommunicatorContract, LeavingRightAfterTheLastCallSpoilsItForNobody) {
  EDUBA_NEEDS_RANKS(4);
  for (const int64_t count : {0, 100, 5'000, 70'000}) {
    for (int round = 0; round < 5; ++round) {
      Group group = Form(4);
      OnThreads(4, [&](int rank) {
        EXPECT_EQ(SumAndCheck(*group[rank], count, 1, Far()), absl::OkStatus())
            << "rank " << rank << ", " << count;
        group[rank].reset();
      });
      group = Form(4);
      OnThreads(4, [&](int rank) {
        EXPECT_EQ(ScatterAndCheck(*group[rank], UnevenParts(4, count), 1, Far()), absl::OkStatus())
            << "rank " << rank << ", " << count;
        group[rank].reset();
      });
    }
  }
}

TEST_P(CommunicatorContract, EveryCallAfterAnErrorReturnsItsTextAsAborted) {
  EDUBA_NEEDS_RANKS(2);
  const Group group = Form(2);
  const absl::Status first = group[0]->Barrier(absl::Now() + absl::Milliseconds(20));
  ASSERT_EQ(first.code(), kDeadlineExceeded);
  std::vector<float> floats(3);
  for (int i = 0; i < 2; ++i) {
    for (const absl::Status& later :
         {SumAndCheck(*group[0], 1, 1, Far()), ScatterAndCheck(*group[0], {1, 2}, 1, Far()),
          group[0]->MaxF32(absl::MakeSpan(floats), Far()), SendNothing(*group[0]),
          group[0]->Barrier(Far())}) {
      EXPECT_EQ(later.code(), kAborted);
      EXPECT_EQ(later.message(), first.message());
    }
  }
}

TEST_P(CommunicatorContract, TwoRanksThatCallDifferentlyAreBothToldSo) {
  EDUBA_NEEDS_RANKS(2);
  for (const Mismatch& mismatch : Mismatches()) {
    SCOPED_TRACE(mismatch.what);
    const Group group = Form(2);
    OnThreads(2, [&](int rank) {
      const absl::Status status = rank == 0 ? mismatch.most(*group[0]) : mismatch.odd(*group[1]);
      EXPECT_EQ(status.code(), kInternal) << mismatch.what << ": " << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("different calls")) << mismatch.what;
    });
  }
}

// The first to find the difference ends the group, so others may only learn that it is gone.
TEST_P(CommunicatorContract, AmongManyRanksNobodyGetsAnAnswerFromDifferentCalls) {
  EDUBA_NEEDS_RANKS(4);
  for (const Mismatch& mismatch : Mismatches()) {
    const Group group = Form(4);
    std::atomic<int> told = 0;
    OnThreads(4, [&](int rank) {
      const absl::Status status = rank == 2 ? mismatch.odd(*group[rank]) : mismatch.most(*group[rank]);
      EXPECT_THAT(status.code(), AnyOf(Eq(kInternal), Eq(kUnavailable))) << mismatch.what << ": " << status;
      if (status.code() == kInternal) ++told;
    });
    EXPECT_GE(told, 1) << mismatch.what;
  }
}

TEST_P(CommunicatorContract, AnAbortAtAnyMomentOfAStreamEndsEveryRankWithAnErrorAndNoWrongSum) {
  EDUBA_NEEDS_RANKS(3);
  const uint32_t seed = 77;
  std::mt19937 random(seed);
  for (int round = 0; round < 10; ++round) {
    const int ranks = 3;
    const Group group = Form(ranks);
    const int victim = static_cast<int>(random() % ranks);
    const int64_t at = random() % 50;
    std::atomic<int64_t> calls = 0;
    std::thread aborter([&] {
      while (calls < at) std::this_thread::yield();
      group[victim]->Abort(absl::CancelledError("enough"));
    });
    OnThreads(ranks, [&](int rank) {
      absl::Status status;
      for (int64_t call = 0; status.ok(); ++call, ++calls) {
        const int64_t count = 3'000 * (call % 7);
        status = call % 2 == 0 ? SumAndCheck(*group[rank], count, call, Far())
                               : ScatterAndCheck(*group[rank], UnevenParts(ranks, count), call, Far());
      }
      EXPECT_THAT(status.code(), AnyOf(Eq(kAborted), Eq(kUnavailable)))
          << status << " (seed=" << seed << " round=" << round << " rank=" << rank << " victim=" << victim;
    });
    aborter.join();
  }
}

TEST_P(CommunicatorContract, ANewGroupWorksAfterAnAbort) {
  EDUBA_NEEDS_RANKS(3);
  {
    const Group group = Form(3);
    group[1]->Abort(absl::CancelledError("over"));
    OnThreads(3, [&](int rank) { EXPECT_NE(group[rank]->Barrier(Far()).code(), kOk); });
  }
  const Group group = Form(3);
  OnThreads(3, [&](int rank) { EXPECT_EQ(SumAndCheck(*group[rank], 500, 1, Far()), absl::OkStatus()); });
}

int64_t Entries(const char* directory) {
  const auto entries = std::filesystem::directory_iterator(directory);
  return std::distance(begin(entries), end(entries));
}

TEST_P(CommunicatorContract, TwentyRebuildsLeakNoDescriptorAndNoThread) {
  EDUBA_NEEDS_RANKS(3);
  const auto rebuild = [&](int round) {
    const Group group = Form(3);
    OnThreads(3,
              [&](int rank) { EXPECT_EQ(SumAndCheck(*group[rank], 100, round, Far()), absl::OkStatus()); });
    if (round % 2 == 1) group[round % 3]->Abort(absl::CancelledError("over"));
  };
  rebuild(0);
  const int64_t descriptors = Entries("/proc/self/fd");
  const int64_t threads = Entries("/proc/self/task");
  for (int round = 1; round <= 20; ++round) rebuild(round);
  EXPECT_LE(Entries("/proc/self/fd"), descriptors);
  // A joined thread may stay in /proc for a moment.
  const absl::Time limit = Far();
  while (Entries("/proc/self/task") > threads && absl::Now() < limit) std::this_thread::yield();
  EXPECT_LE(Entries("/proc/self/task"), threads);
}

// What ranks that are processes are asked (tests/faults/communicator_kill_test.cc), here of threads.
TEST_P(CommunicatorContract, TheCasesForProcessesHoldForThreads) {
  EDUBA_NEEDS_RANKS(3);
  std::mutex mutex;
  std::map<std::string, Join> groups;
  const auto join = [&](int rank, const std::string& name, absl::Time deadline) {
    Join* group = nullptr;
    {
      const std::scoped_lock lock(mutex);
      group = &groups[name];
      if (*group == nullptr) *group = GetParam().new_group();
    }
    return (*group)(rank, 3, deadline);
  };
  OnThreads(3, [&](int rank) {
    CaseOptions options;
    options.rank = rank;
    options.size = 3;
    options.patience = absl::Milliseconds(200);
    options.join = [&, rank](const std::string& name, absl::Time deadline) {
      return join(rank, name, deadline);
    };
    EXPECT_THAT(BrokenPromises(options), testing::IsEmpty()) << "rank " << rank;
  });
}

INSTANTIATE_TEST_SUITE_P(All, CommunicatorContract,
                         testing::Values(Transport{"local", NewLocalGroup, "local"},
                                         Transport{"gloo", NewGlooGroup, "gloo"},
                                         Transport{"nccl_fake", NewFakeNcclGroup, "nccl", false},
                                         Transport{"nccl", NewNcclGroup, "nccl", false}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace eduba
