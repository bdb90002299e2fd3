// Steps whose sums stay on the GPU: attention/sharded_attention.h over the CUDA backend and NCCL, both
// emulated on the host. The judge is the same backend with sums that travel through host memory.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "attention/sharded_attention.h"
#include "collective/map_rendezvous.h"
#include "collective/nccl/fake_nccl.h"
#include "collective/testing/forwarding_communicator.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/emulated_device.h"
#include "kernels/page_lists.h"
#include "tests/contract/attention_problem.h"

namespace eduba {
namespace {

// Another communicator, without its way to reduce on a GPU, or with its calls counted.
class Watched final : public testing::ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;

  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    ++host_sums;
    return ForwardingCommunicator::SumI64(data, deadline);
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    ++host_scatters;
    return ForwardingCommunicator::ReduceScatterI64(data, counts, deadline);
  }
  DeviceSums* device_sums() override {
    return hides_device_sums ? nullptr : ForwardingCommunicator::device_sums();
  }

  int host_sums = 0;
  int host_scatters = 0;
  bool hides_device_sums = false;
};

absl::Time Soon() { return absl::Now() + absl::Seconds(60); }

void OnEachRank(int ranks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(ranks);
  for (int r = 0; r < ranks; ++r) threads.emplace_back(body, r);
  for (std::thread& thread : threads) thread.join();
}

std::vector<std::unique_ptr<Watched>> Form(int ranks, int gpu = cuda::kEmulatedDeviceIndex) {
  std::vector<std::unique_ptr<Watched>> group(ranks);
  MapRendezvous store;
  OnEachRank(ranks, [&](int r) {
    NcclParts parts = FakeNcclParts();
    parts.gpu = gpu;
    auto joined = ConnectNcclForTest(r, ranks, store, std::move(parts), Soon());
    ASSERT_TRUE(joined.ok()) << joined.status();
    group[r] = std::make_unique<Watched>(*std::move(joined));
  });
  return group;
}

RankGroup Backends(int ranks, CudaPrecision precision) {
  std::vector<std::unique_ptr<Backend>> backends;
  for (int r = 0; r < ranks; ++r) {
    CudaOptions options;
    options.precision = precision;
    options.page_bytes = int64_t{64} << 20;
    options.partial_bytes = int64_t{32} << 20;
    backends.push_back(*MakeCudaBackendOn(cuda::MakeEmulatedDevice(int64_t{1} << 30), options));
  }
  return RankGroup(std::move(backends));
}

// Some on the sink path, some not, with token sinks, learned ones, both and none.
Problem MakeProblem(uint64_t seed, int rows) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[random() % sizeof...(options)];
  };
  ProblemSpec spec;
  spec.seed = seed;
  spec.shape.kv_heads = pick(1, 2, 3);
  spec.shape.query_heads = spec.shape.kv_heads * pick(1, 3, 8);
  spec.shape.head_dim = pick(16, 33, 64);
  spec.shape.value_dim = pick(10, 64, 130);
  spec.shape.key_dtype = spec.shape.value_dtype = pick(DType::kF32, DType::kBf16, DType::kF16);
  spec.rows = rows;
  spec.positions = pick(300, 1300);
  spec.sink_tokens = pick(0, 4, 300);
  if (random() % 3 != 0) spec.sink_logit = pick(-300.0F, 0.0F, 3.0F, 300.0F);
  spec.logit_size = pick(1.0F, 20.0F);
  spec.partly_visible_sinks = pick(false, true);
  return Problem(spec);
}

// The pages of a problem on rank `rank` of `ranks`, which has every ranks'th.
struct Step {
  Step(RankGroup& group, const Problem& problem, int rank, int ranks) {
    for (int64_t p = 0; p < PageCount(problem.spec.positions); ++p) {
      if (p % ranks == rank) pages.push_back({group.page(p), p});
    }
    const int64_t sinks = std::min<int64_t>(problem.spec.sink_tokens, problem.spec.positions);
    for (int64_t p = 0; p < PageCount(sinks); ++p) sink_pages.push_back({group.page(p), p});
    args.shape = problem.spec.shape;
    args.rows = problem.spec.rows;
    args.queries = problem.queries.data();
    args.visible = problem.visible;
    args.pages = pages;
    lists = OwnedPageLists(static_cast<int64_t>(pages.size()), problem.spec.rows);
    args.lists = lists.view();
    args.sink_pages = sink_pages;
    args.visible_sinks = problem.visible_sinks;
    args.sink_logits = problem.sink_logits;
    args.exponents = problem.exponents;
    args.positions = problem.spec.positions;
  }
  std::vector<PageRef> pages, sink_pages;
  OwnedPageLists lists;
  StepArgs args;
};

using Answers = absl::StatusOr<std::vector<AttentionAnswer>>;

// `problems` together, on every rank; or each problem for rank `owners` of it.
std::vector<Answers> AttendAll(RankGroup& group, absl::Span<const Problem> problems,
                               const std::vector<std::unique_ptr<Watched>>& communicators,
                               absl::Span<const int> owners = {}, absl::Time deadline = Soon()) {
  const auto ranks = static_cast<int>(communicators.size());
  std::vector<Answers> answers(ranks, absl::UnknownError("not asked"));
  OnEachRank(ranks, [&](int r) {
    std::vector<std::unique_ptr<Step>> steps;
    std::vector<StepArgs> args;
    for (const Problem& problem : problems) {
      steps.push_back(std::make_unique<Step>(group, problem, r, ranks));
      args.push_back(steps.back()->args);
    }
    answers[r] = AttendPages(group.backend(r), communicators[r].get(), args, owners, deadline);
  });
  return answers;
}

void ExpectSame(const AttentionAnswer& a, const AttentionAnswer& b) {
  EXPECT_EQ(a.outputs, b.outputs);
  EXPECT_EQ(a.lse, b.lse);
  EXPECT_EQ(a.sink_mass, b.sink_mass);
  EXPECT_EQ(a.row_heads_maximum, b.row_heads_maximum);
  EXPECT_EQ(a.collectives, b.collectives);
}

class GpuSums : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
    TheFakeNccl().Reset();
  }
  void TearDown() override { TheFakeNccl().Reset(); }
};

TEST_F(GpuSums, GiveTheBytesOfSumsOnTheHost) {
  for (const CudaPrecision precision : {CudaPrecision::kExact, CudaPrecision::kTensor}) {
    for (const int ranks : {1, 2, 3}) {
      RankGroup group = Backends(ranks, precision);
      const auto on_gpu = Form(ranks);
      const auto on_host = Form(ranks);
      for (const auto& one : on_host) one->hides_device_sums = true;
      int64_t on_sink_path = 0;
      int64_t on_maximum_path = 0;
      for (uint64_t seed = 1; seed <= 12; ++seed) {
        const Problem problem = MakeProblem(seed, static_cast<int>(1 + seed % 7));
        SCOPED_TRACE(absl::StrCat(ranks, " ranks: ", problem.spec.ToString()));
        group.Load(problem);
        // Its last row has other words than the first, so steps that share their place show.
        const std::vector<Problem> together = {problem, problem.WithRows({problem.spec.rows - 1})};
        for (const auto& one : on_gpu) one->host_sums = 0;
        const auto answers = AttendAll(group, together, on_gpu);
        const auto wanted = AttendAll(group, together, on_host);
        for (int r = 0; r < ranks; ++r) {
          ASSERT_TRUE(answers[r].ok() && wanted[r].ok()) << answers[r].status() << wanted[r].status();
          for (size_t i = 0; i < together.size(); ++i) ExpectSame((*answers[r])[i], (*wanted[r])[i]);
        }
        if (ranks > 1 && (*answers[0])[0].collectives == 1 && (*answers[0])[1].collectives == 1) {
          EXPECT_EQ(on_gpu[0]->host_sums, 0);  // Nothing came by the host.
        }
        for (const int32_t heads : (*answers[0])[0].row_heads_maximum) {
          on_maximum_path += heads;
          on_sink_path += problem.spec.shape.query_heads - heads;
        }
      }
      EXPECT_GT(on_sink_path, 0);
      EXPECT_GT(on_maximum_path, 0);
    }
  }
}

// Each step for one rank: over the GPU, the host, or both, it gets what it gets where all ranks answer.
TEST_F(GpuSums, OfOneRankAloneAreTheBytesThatAllGet) {
  for (const CudaPrecision precision : {CudaPrecision::kExact, CudaPrecision::kTensor}) {
    for (const int ranks : {2, 3}) {
      RankGroup group = Backends(ranks, precision);
      const auto communicators = Form(ranks);
      const auto mixed = Form(ranks);
      mixed[1]->hides_device_sums = true;
      int stayed = 0;
      int with_maximum = 0;
      for (uint64_t seed = 1; seed <= 12; ++seed) {
        const Problem problem = MakeProblem(seed, static_cast<int>(1 + seed % 7));
        SCOPED_TRACE(absl::StrCat(ranks, " ranks: ", problem.spec.ToString()));
        group.Load(problem);
        const std::vector<Problem> problems = {problem, problem.WithRows({problem.spec.rows - 1}), problem};
        const std::vector<int> owners = {0, 1, ranks - 1};
        const auto wanted = AttendAll(group, problems, communicators);
        for (const auto* group_of : {&communicators, &mixed}) {
          (*group_of)[0]->host_scatters = 0;
          const auto answers = AttendAll(group, problems, *group_of, owners);
          for (int r = 0; r < ranks; ++r) {
            ASSERT_TRUE(answers[r].ok() && wanted[r].ok()) << answers[r].status() << wanted[r].status();
            for (size_t i = 0; i < problems.size(); ++i) {
              if (owners[i] == r) {
                ExpectSame((*answers[r])[i], (*wanted[r])[i]);
              } else {
                EXPECT_TRUE((*answers[r])[i].outputs.empty());
              }
            }
          }
          const AttentionAnswer& first = (*answers[0])[0];
          if (first.collectives == 1) {
            ++stayed;
            EXPECT_EQ((*group_of)[0]->host_scatters, 0);  // Only rank 1's words came by the host.
          }
          with_maximum += first.collectives > 1 ? 1 : 0;
        }
      }
      EXPECT_GT(stayed, 0);
      EXPECT_GT(with_maximum, 0);
    }
  }
}

// A part that is more than a piece of the reduce-scatter, and a rank that wants other parts.
TEST_F(GpuSums, OfOneRankAloneMayBeLongerThanAPieceAndHaveToAgree) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.shape = {32, 2, 16, 254, DType::kBf16, DType::kBf16, 0.25F, 0};
  spec.rows = 70;
  spec.sink_tokens = 4;
  const Problem problem(spec);
  group.Load(problem);
  ASSERT_GT(int64_t{70} * 32 * 256, int64_t{1} << 19);
  const std::vector<Problem> problems = {problem, problem.WithRows({0})};
  const auto alone = group.Attend(problem, {0, 1});
  const auto communicators = Form(2);
  for (const bool mixed : {false, true}) {
    communicators[1]->hides_device_sums = mixed;
    const auto answers = AttendAll(group, problems, communicators, {0, 1});
    ASSERT_TRUE(alone.ok() && answers[0].ok() && answers[1].ok()) << alone.status() << answers[0].status();
    EXPECT_EQ((*answers[0])[0].outputs, alone->outputs);
    EXPECT_EQ((*answers[0])[0].lse, alone->lse);
  }

  std::atomic<int> internal = 0;
  OnEachRank(2, [&](int r) {
    const Step step(group, problem, r, 2);
    const auto answer = AttendPages(group.backend(r), communicators[r].get(), {step.args}, {r}, Soon());
    ASSERT_FALSE(answer.ok());
    internal += absl::IsInternal(answer.status()) ? 1 : 0;
  });
  EXPECT_GE(internal, 1);
}

// More words than the first frame of a call holds.
TEST_F(GpuSums, MayBeLongerThanAFrame) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.shape = {8, 2, 16, 130, DType::kBf16, DType::kBf16, 0.25F, 0};
  spec.rows = 20;
  spec.sink_tokens = 4;
  const Problem problem(spec);
  group.Load(problem);
  ASSERT_GT(int64_t{20} * 8 * 132, 8704);
  const auto communicators = Form(2);
  const auto answers = AttendAll(group, {problem}, communicators);
  const auto alone = group.Attend(problem, {0, 1});
  ASSERT_TRUE(alone.ok()) << alone.status();
  for (const Answers& one : answers) {
    ASSERT_TRUE(one.ok()) << one.status();
    EXPECT_EQ((*one)[0].outputs, alone->outputs);
    EXPECT_EQ((*one)[0].lse, alone->lse);
  }
}

// A GPU that is another than the communicator's sums through host memory, with one that is the same.
TEST_F(GpuSums, MixWithSumsOnTheHost) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  const Problem problem = MakeProblem(3, 2);
  group.Load(problem);
  auto communicators = Form(2);
  communicators[1]->hides_device_sums = true;
  const auto answers = AttendAll(group, {problem}, communicators);
  ASSERT_TRUE(answers[0].ok() && answers[1].ok()) << answers[0].status() << answers[1].status();
  ExpectSame((*answers[0])[0], (*answers[1])[0]);
  const auto elsewhere = Form(2, /*gpu=*/0);
  const auto others = AttendAll(group, {problem}, elsewhere);
  ASSERT_TRUE(others[0].ok()) << others[0].status();
  ExpectSame((*others[0])[0], (*answers[0])[0]);
  EXPECT_GT(elsewhere[0]->host_sums, 0);
}

TEST_F(GpuSums, ARankThatCallsForOtherRowsIsFoundOut) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.rows = 3;
  spec.sink_logit = 0;
  const Problem problem(spec);
  const Problem less = problem.WithRows({0, 1});
  group.Load(problem);
  const auto communicators = Form(2);
  std::atomic<int> internal = 0;
  OnEachRank(2, [&](int r) {
    const Step step(group, r == 0 ? problem : less, r, 2);
    const auto answer = AttendPages(group.backend(r), communicators[r].get(), {step.args}, {}, Soon());
    ASSERT_FALSE(answer.ok());
    // The first to see it ends the group, and so may be the only one to say why.
    internal += absl::IsInternal(answer.status()) ? 1 : 0;
  });
  EXPECT_GE(internal, 1);
}

TEST_F(GpuSums, AMissingRankIsADeadlineAndTheBackendLivesOn) {
  TheFakeNccl().peers_are_told = false;
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.sink_logit = 0;
  const Problem problem(spec);
  group.Load(problem);
  {
    const auto communicators = Form(2);
    const Step step(group, problem, 0, 2);
    const auto answer = AttendPages(group.backend(0), communicators[0].get(), {step.args}, {},
                                    absl::Now() + absl::Milliseconds(200));
    EXPECT_EQ(answer.status().code(), absl::StatusCode::kDeadlineExceeded) << answer.status();
    EXPECT_FALSE(AttendPages(group.backend(0), communicators[0].get(), {step.args}, {}, Soon()).ok());
  }
  const auto answers = AttendAll(group, {problem}, Form(2));
  EXPECT_TRUE(answers[0].ok()) << answers[0].status();
}

// Nothing after the all-reduce may wait for the GPU, as memory that grows would.
TEST_F(GpuSums, AMissingRankIsADeadlineForALargerStepThanAnyBefore) {
  TheFakeNccl().peers_are_told = false;
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.shape = {4, 2, 16, 64, DType::kBf16, DType::kBf16, 0.25F, 0};
  spec.rows = 20;
  spec.sink_logit = 0;
  const Problem problem(spec);
  group.Load(problem);
  const auto before = AttendAll(group, {problem.WithRows({0})}, Form(2));
  ASSERT_TRUE(before[0].ok()) << before[0].status();
  const auto communicators = Form(2);
  absl::Notification is_over;
  std::thread guard([&] {
    if (!is_over.WaitForNotificationWithTimeout(absl::Seconds(10))) {
      communicators[0]->Abort(absl::CancelledError("no deadline was kept"));
    }
  });
  const Step step(group, problem, 0, 2);
  const auto answer = AttendPages(group.backend(0), communicators[0].get(), {step.args}, {},
                                  absl::Now() + absl::Milliseconds(200));
  is_over.Notify();
  guard.join();
  EXPECT_EQ(answer.status().code(), absl::StatusCode::kDeadlineExceeded) << answer.status();
}

// Abort reaches a rank whose GPU waits inside the all-reduce, and what its kernels make of it is no answer.
TEST_F(GpuSums, AnAbortEndsTheWait) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.sink_logit = 0;
  const Problem problem(spec);
  group.Load(problem);
  const auto communicators = Form(2);
  TheFakeNccl().waits = 0;
  std::thread aborter([&] {
    while (TheFakeNccl().waits == 0) std::this_thread::yield();
    communicators[0]->Abort(absl::CancelledError("enough"));
  });
  const Step step(group, problem, 0, 2);
  const auto answer = AttendPages(group.backend(0), communicators[0].get(), {step.args}, {}, Soon());
  EXPECT_EQ(answer.status().code(), absl::StatusCode::kAborted) << answer.status();
  aborter.join();
}

// Non-finite arithmetic of one rank reaches all, in the same all-reduce.
TEST_F(GpuSums, AFaultIsEveryRanksError) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.shape.key_dtype = spec.shape.value_dtype = DType::kF32;
  spec.sink_logit = 0;
  spec.positions = 600;
  Problem problem(spec);
  for (float& value : problem.values) value *= 1e30F;  // Beyond their exponents.
  group.Load(problem);
  const auto answers = AttendAll(group, {problem}, Form(2));
  for (const Answers& one : answers) {
    EXPECT_EQ(one.status().code(), absl::StatusCode::kInvalidArgument) << one.status();
    EXPECT_NE(std::string(one.status().message()).find("page "), std::string::npos) << one.status();
  }
}

// The flag of the last row and head is the last word of all, here after the first frame.
TEST_F(GpuSums, AFaultInTheLastWordOfALongSumIsEveryRanksError) {
  RankGroup group = Backends(2, CudaPrecision::kExact);
  ProblemSpec spec;
  spec.shape = {8, 8, 16, 130, DType::kF32, DType::kF32, 0.25F, 0};
  spec.rows = 20;
  spec.sink_logit = 0;
  ASSERT_GT(int64_t{20} * 8 * 132, 8704);
  for (const int faulty : {0, 1}) {
    SCOPED_TRACE(faulty);
    Problem problem(spec);
    // The last row alone sees the faulty rank's page, in which the last head alone is beyond its exponents.
    const PositionRange pages[] = {{0, kPageRows}, {kPageRows, spec.positions}};
    std::fill(problem.visible.begin(), problem.visible.end(), pages[1 - faulty]);
    problem.visible.back() = pages[faulty];
    for (int64_t at = pages[faulty].begin; at < pages[faulty].end; ++at) {
      float* const values = &problem.values[(at * 8 + 7) * 130];
      for (int c = 0; c < 130; ++c) values[c] *= 1e30F;
    }
    group.Load(problem);
    const auto answers = AttendAll(group, {problem}, Form(2), {}, absl::Now() + absl::Seconds(20));
    for (const Answers& one : answers) {
      EXPECT_EQ(one.status().code(), absl::StatusCode::kInvalidArgument) << one.status();
    }
  }
}

}  // namespace
}  // namespace eduba
