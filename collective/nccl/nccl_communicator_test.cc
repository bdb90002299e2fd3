#include "collective/nccl/nccl_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/testing/emulated_queue.h"
#include "collective/map_rendezvous.h"
#include "collective/nccl/fake_nccl.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

// tests/contract/communicator_test.cc tests what every transport promises, over the fake NCCL too. Here is
// what only NCCL can do wrong.
class NcclCommunicatorTest : public testing::Test {
 protected:
  NcclCommunicatorTest() { TheFakeNccl().Reset(); }
  ~NcclCommunicatorTest() override { TheFakeNccl().Reset(); }
};

using Group = std::vector<std::unique_ptr<Communicator>>;

absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

void OnThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

Group Form(
    int size, const std::function<NcclParts(int rank)>& parts = [](int) { return FakeNcclParts(); }) {
  Group group(size);
  MapRendezvous store;
  OnThreads(size, [&](int r) {
    auto joined = ConnectNcclForTest(r, size, store, parts(r), Soon());
    EXPECT_TRUE(joined.ok()) << joined.status();
    if (joined.ok()) group[r] = *std::move(joined);
  });
  return group;
}

TEST_F(NcclCommunicatorTest, RefusesARankOutsideTheGroup) {
  MapRendezvous store;
  EXPECT_EQ(ConnectNcclForTest(2, 2, store, FakeNcclParts(), Soon()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(NcclCommunicatorTest, RefusesAnIdOfAnotherSize) {
  MapRendezvous store;
  ASSERT_TRUE(store.Set("nccl/id", "00ff", Soon()).ok());
  const absl::Status status = ConnectNcclForTest(1, 2, store, FakeNcclParts(), Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("4 digits"));
}

TEST_F(NcclCommunicatorTest, WhereLinksTellNothingADeadRankEndsTheCallAtItsDeadline) {
  TheFakeNccl().peers_are_told = false;
  Group group = Form(3);
  group[1].reset();
  std::vector<std::thread> threads;
  for (const int r : {0, 2}) {
    threads.emplace_back([&, r] {
      const absl::Time deadline = absl::Now() + absl::Milliseconds(200);
      const absl::Status status = group[r]->Barrier(deadline);
      EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    });
  }
  for (std::thread& thread : threads) thread.join();
  group.clear();
  EXPECT_EQ(TheFakeNccl().aborts, 3);
  Form(3);  // The next epoch works.
}

TEST_F(NcclCommunicatorTest, AnErrorThatNcclFindsBetweenCallsEndsTheNextOne) {
  Group group = Form(2);
  TheFakeNccl().async_error = 3;
  while (TheFakeNccl().aborts < 2) std::this_thread::yield();  // The watchdogs saw it by themselves.
  for (auto& rank : group) {
    const absl::Status status = rank->Barrier(Soon());
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("NCCL: fake error"));
  }
}

TEST_F(NcclCommunicatorTest, AnAllReduceThatNcclRefusesIsUnavailable) {
  Group group = Form(2);
  TheFakeNccl().all_reduce_result = 1;
  EXPECT_EQ(group[0]->Barrier(Soon()).code(), absl::StatusCode::kUnavailable);
}

TEST_F(NcclCommunicatorTest, AFailedDeviceIsUnavailableAndNeverAResult) {
  Group group = Form(2);
  TheFakeNccl().device_fails = true;
  std::vector<int64_t> data = {1};
  const absl::Status status = group[0]->SumI64(absl::MakeSpan(data), Soon());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the device is lost"));
}

// An aborted all-reduce leaves a rank's own words where the maximum should be. They must not pass for a
// result.
TEST_F(NcclCommunicatorTest, AnAbortedMaximumIsNoResult) {
  Group group = Form(2);
  TheFakeNccl().looks = 0;
  TheFakeNccl().looks_wait_for_abort = true;  // The call finds its work done when the abort is over.
  std::vector<float> data = {1, 2, 3};
  std::thread aborter([&] {
    while (TheFakeNccl().looks == 0) std::this_thread::yield();
    group[0]->Abort(absl::CancelledError("enough"));
  });
  EXPECT_EQ(group[0]->MaxF32(absl::MakeSpan(data), Soon()).code(), absl::StatusCode::kAborted);
  aborter.join();
}

// Parts for ranks, where rank 0 waits only a short time for an abort. A worker would then end its process.
// Here a stuck abort is counted, and NCCL is let go so that the test can end.
std::function<NcclParts(int rank)> FreedWhenStuck(std::atomic<int>& stuck, std::atomic<bool>& in_nccl) {
  return [&stuck, &in_nccl](int rank) {
    NcclParts parts = FakeNcclParts();
    if (rank == 1) return parts;
    parts.abort_limit = absl::Milliseconds(30);
    parts.on_stuck_abort = [&stuck, &in_nccl] {
      ++stuck;
      in_nccl = false;
    };
    return parts;
  };
}

TEST_F(NcclCommunicatorTest, AnAbortThatDoesNotReturnIsReported) {
  std::atomic<int> stuck{0};
  Group group = Form(2, FreedWhenStuck(stuck, TheFakeNccl().abort_is_stuck));
  TheFakeNccl().abort_is_stuck = true;
  group[0]->Abort(absl::CancelledError("over"));
  group[0].reset();
  EXPECT_EQ(stuck, 1);
}

TEST_F(NcclCommunicatorTest, OneRankNeedsNoNcclAtAll) {
  TheFakeNccl().async_error = 3;
  Group group = Form(1);
  std::vector<int64_t> data = {1, 2};
  EXPECT_EQ(group[0]->SumI64(absl::MakeSpan(data), Soon()), absl::OkStatus());
  EXPECT_EQ(data, (std::vector<int64_t>{1, 2}));
}

// The first frame has room for 8702 words, each block after it for 2^20.
TEST_F(NcclCommunicatorTest, SumsInDeviceMemoryHaveEveryWordAtEveryLength) {
  constexpr int kRanks = 2;
  Group group = Form(kRanks);
  EmulatedQueue queues[kRanks];  // The streams of those who fill the words.
  constexpr int64_t kFirst = 8702;
  constexpr int64_t kBlock = 1 << 20;
  const auto word = [](int64_t i, int rank) { return (i + 1) * (rank == 0 ? 1 : 1'000'003); };
  for (const int64_t count : {int64_t{1}, kFirst - 1, kFirst, kFirst + 1, kFirst + 2, kFirst + kBlock - 1,
                              kFirst + kBlock, kFirst + kBlock + 1, int64_t{1}}) {
    for (const bool scatters : {false, true}) {
      SCOPED_TRACE(absl::StrCat(count, scatters ? " words, each rank's own" : " words"));
      // The second rank's part is the longer one.
      const std::vector<int64_t> parts = {count / 3, count - count / 3};
      OnThreads(kRanks, [&](int r) {
        DeviceSums* const sums = group[r]->device_sums();
        const auto words = sums->Words(count);
        ASSERT_TRUE(words.ok()) << words.status();
        for (int64_t i = 0; i < count; ++i) (*words)[i] = word(i, r);
        ASSERT_EQ(sums->Start(&queues[r], scatters ? parts : std::vector<int64_t>(), Soon()),
                  absl::OkStatus());
        ASSERT_EQ(sums->Finish(Soon()), absl::OkStatus());
        const int64_t begin = scatters && r == 1 ? parts[0] : 0;
        const int64_t end = scatters && r == 0 ? parts[0] : count;
        for (int64_t i = begin; i < end; ++i) ASSERT_EQ((*words)[i], word(i, 0) + word(i, 1)) << i;
      });
    }
  }
}

// The sum of words in device memory on a caller's stream, where a kernel before it runs until `ends`.
class SlowKernel {
 public:
  explicit SlowKernel(absl::Duration abort_limit)
      : group_(Form(2, [&](int rank) {
          NcclParts parts = FakeNcclParts();
          if (rank == 1) return parts;
          parts.abort_limit = abort_limit;
          parts.on_stuck_abort = [this] {
            // A worker would end its process here.
            ++stuck;
            ends = true;
            TheFakeNccl().abort_is_stuck = false;
          };
          return parts;
        })) {}

  void Start(absl::Time deadline) {
    queue_.Push([this] { return ends.load(); });
    EXPECT_TRUE(group_[0]->device_sums()->Words(100).ok());
    EXPECT_EQ(group_[0]->device_sums()->Start(&queue_, {}, deadline), absl::OkStatus());
  }
  void Abort() { group_[0]->Abort(absl::CancelledError("enough")); }
  void OtherRankLeaves() { group_[1].reset(); }
  absl::Status Finish(absl::Time deadline) { return group_[0]->device_sums()->Finish(deadline); }
  // Returns when the abort is over.
  void Leave() { group_[0].reset(); }

  std::atomic<int> stuck{0};
  std::atomic<bool> ends{false};

 private:
  EmulatedQueue queue_;
  Group group_;
};

// The limit of an abort begins with the end of the kernel. With a limit of nothing, an abort that did not
// wait for the kernel would be stuck at once.
TEST_F(NcclCommunicatorTest, AnAbortIsNotStuckWhileAKernelBeforeItRuns) {
  SlowKernel kernel(absl::ZeroDuration());
  const absl::Time deadline = absl::InfiniteFuture();
  kernel.Start(deadline);
  kernel.OtherRankLeaves();
  EXPECT_EQ(kernel.Finish(deadline).code(), absl::StatusCode::kUnavailable);
  // The link asks again and again whether the kernel has ended.
  TheFakeNccl().looks = 0;
  while (TheFakeNccl().looks < 10 && kernel.stuck == 0) std::this_thread::yield();
  EXPECT_EQ(kernel.stuck, 0);
  kernel.ends = true;
  kernel.Leave();
}

TEST_F(NcclCommunicatorTest, AnAbortAfterAKernelThatNeverEndsIsStuckAfterTheDeadline) {
  SlowKernel kernel(absl::Milliseconds(30));
  const absl::Time deadline = absl::Now() + absl::Seconds(1);
  kernel.Start(deadline);
  kernel.OtherRankLeaves();
  EXPECT_FALSE(kernel.Finish(deadline).ok());
  kernel.Leave();
  EXPECT_GE(absl::Now(), deadline);
  EXPECT_EQ(kernel.stuck, 1);
}

// The abort does not wait for the deadline, which never passes, when there is nothing before it that runs.
TEST_F(NcclCommunicatorTest, AnAbortAfterAKernelThatHasEndedIsStuckAfterItsLimit) {
  SlowKernel kernel(absl::Milliseconds(30));
  kernel.ends = true;
  const absl::Time deadline = absl::InfiniteFuture();
  kernel.Start(deadline);
  TheFakeNccl().abort_is_stuck = true;
  absl::Notification is_over;
  std::thread guard([&] {
    if (!is_over.WaitForNotificationWithTimeout(absl::Seconds(60))) TheFakeNccl().abort_is_stuck = false;
  });
  kernel.Abort();
  EXPECT_EQ(kernel.Finish(deadline).code(), absl::StatusCode::kAborted);
  kernel.Leave();
  is_over.Notify();
  guard.join();
  EXPECT_EQ(kernel.stuck, 1);
}

// The thread of the call is inside CUDA. CUDA waits for the all-reduce, and the all-reduce waits for a rank.
TEST_F(NcclCommunicatorTest, ADeadlineIsKeptWhileTheCallIsStuckInCuda) {
  TheFakeNccl().peers_are_told = false;
  TheFakeNccl().looks_wait = true;
  absl::Notification is_over;
  Group group(2);
  MapRendezvous store;
  OnThreads(2, [&](int r) {
    auto joined = ConnectNcclForTest(r, 2, store, FakeNcclParts(), Soon());
    ASSERT_TRUE(joined.ok()) << joined.status();
    group[r] = *std::move(joined);
  });
  std::thread guard([&] {
    if (is_over.WaitForNotificationWithTimeout(absl::Seconds(20))) return;
    group[0]->Abort(absl::CancelledError("no deadline was kept"));
  });
  const absl::Time deadline = absl::Now() + absl::Milliseconds(100);
  const absl::Status status = group[0]->Barrier(deadline);
  is_over.Notify();
  guard.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_GE(absl::Now(), deadline);
}

// While a call is stuck in NCCL no abort can begin, so the process has to end.
TEST_F(NcclCommunicatorTest, ADeadlineIsKeptWhileTheCallIsStuckInNccl) {
  std::atomic<int> stuck{0};
  Group group = Form(2, FreedWhenStuck(stuck, TheFakeNccl().call_is_stuck));
  absl::Notification is_over;
  std::thread guard([&] {
    if (!is_over.WaitForNotificationWithTimeout(absl::Seconds(20))) TheFakeNccl().call_is_stuck = false;
  });
  TheFakeNccl().call_is_stuck = true;
  const absl::Status status = group[0]->Barrier(absl::Now() + absl::Milliseconds(100));
  is_over.Notify();
  guard.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  group.clear();
  EXPECT_EQ(stuck, 1);
}

TEST_F(NcclCommunicatorTest, AGroupThatNcclRefusesIsAFailedPreconditionWithItsReason) {
  const auto join = [](int result, const char* last_error) {
    TheFakeNccl().async_error = result;
    TheFakeNccl().last_error = last_error;
    MapRendezvous store;
    std::vector<absl::Status> statuses(2);
    OnThreads(
        2, [&](int r) { statuses[r] = ConnectNcclForTest(r, 2, store, FakeNcclParts(), Soon()).status(); });
    EXPECT_EQ(statuses[0].code(), statuses[1].code()) << statuses[0] << statuses[1];
    EXPECT_EQ(statuses[0].message().find('\n'), absl::string_view::npos) << statuses[0];
    return statuses[0];
  };
  const char* const duplicate = "\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000";
  for (const int result : {kNcclInvalidUsage, kNcclInvalidArgument}) {
    const absl::Status status = join(result, duplicate);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("both on CUDA device 1000"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("--transport gloo"));
  }
  EXPECT_EQ(join(kNcclCudaError, "Cuda failure 2 'out of memory'").code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(join(kNcclSystemError, "").code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(join(kNcclRemoteError, "").code(), absl::StatusCode::kUnavailable);
  // The warning is of an earlier group.
  EXPECT_EQ(join(kNcclRemoteError, "Cuda failure 2 'out of memory'").code(), absl::StatusCode::kUnavailable);
}

// NCCL gives the same error to a call of a group that has formed. Then it does not say who may join.
TEST_F(NcclCommunicatorTest, ARefusalAfterTheGroupHasFormedIsUnavailable) {
  Group group = Form(2);
  TheFakeNccl().async_error = kNcclInvalidUsage;
  EXPECT_EQ(group[0]->Barrier(Soon()).code(), absl::StatusCode::kUnavailable);
}

TEST(LoadNccl, WithoutTheLibraryOrWithAnotherSaysHowToInstallIt) {
  struct Case {
    const char* library;
    const char* says;
  };
  for (const Case& one :
       {Case{"libnccl_that_is_absent.so.2", "cannot be loaded"},
        Case{"libdl.so.2", "does not say its version"}, Case{EDUBA_OLD_NCCL, "has version 2.13.4"}}) {
    const absl::Status status = LoadNcclForTest(one.library).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    const std::string message(status.message());
    EXPECT_THAT(message, HasSubstr(one.library));
    EXPECT_THAT(message, HasSubstr(one.says));
    EXPECT_THAT(message, HasSubstr("install NCCL 2.14 or newer"));
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

// Where NCCL or the device is missing, one line says what to do.
TEST(ConnectNccl, WithoutADeviceIsAClearError) {
  MapRendezvous store;
  const auto joined = ConnectNccl(0, 1, store, {.device = 4711}, Soon());
  ASSERT_FALSE(joined.ok());
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kFailedPrecondition) << joined.status();
  EXPECT_EQ(std::string(joined.status().message()).find('\n'), std::string::npos);
}

}  // namespace
}  // namespace eduba
