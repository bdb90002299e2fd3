// The contract of kernels/backend.h, for every backend: the reference, the CPU kernels on each instruction
// set this machine runs, the GPU's kernels emulated on the host, and those on a GPU, which are skipped where
// there is none.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/parallel.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/score_dot.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/emulated_device.h"
#include "kernels/fingerprint.h"
#include "kernels/page_lists.h"
#include "kernels/reference/reference_backend.h"
#include "tests/contract/attention_problem.h"

namespace eduba {
namespace {

using Values = ProblemSpec::Values;
using Visible = ProblemSpec::Visible;

struct BackendChoice {
  std::string name;
  std::function<std::unique_ptr<Backend>(int threads)> make;
  bool fused = true;       // Its chip multiplies and adds in one operation.
  bool is_tensor = false;  // It multiplies on tensor cores where keys and values are 16 bits.
  // It rounds queries to bf16 where keys are bf16.
  bool is_rounded = false;
  bool is_warpgroup = false;  // Its tensor cores take weights for f16 in one term.

  bool IsEmulated() const { return name.starts_with("cuda_emulated"); }
  // The largest error relative to the magnitudes, and the largest of a logit's exponential.
  double Error(DType dtype) const {
    if (is_rounded && dtype == DType::kBf16) return 3e-5;
    if (is_warpgroup && dtype == DType::kF16) return 6e-4;
    return is_tensor && dtype != DType::kF32 ? 3e-4 : 3e-6;
  }
  double LogitError(DType dtype) const {
    if (is_rounded && dtype == DType::kBf16) return 1e-5;
    return is_tensor && dtype != DType::kF32 ? 5e-5 : 1e-6;
  }
  // With queries that a backend does not have to round.
  Problem MakeProblem(const ProblemSpec& spec) const {
    Problem problem(spec);
    if (is_rounded && spec.shape.key_dtype == DType::kBf16) {
      for (float& q : problem.queries) q = F32FromBf16(Bf16FromF32(q));
    }
    return problem;
  }
};

std::unique_ptr<Backend> RoundedCpu(int threads, const std::string& target) {
  return MakeCpuBackendForTest(threads, target, kKeptPartialsBytesMax, Activations::kBf16);
}

// Small, because a test has many.
CudaOptions SmallCuda(int threads, CudaPrecision precision = CudaPrecision::kExact) {
  CudaOptions options;
  options.precision = precision;
  options.page_bytes = int64_t{64} << 20;
  options.partial_bytes = int64_t{32} << 20;
  options.threads = threads;
  return options;
}

std::unique_ptr<Backend> EmulatedCuda(const CudaOptions& options, bool has_warpgroups = false) {
  return *MakeCudaBackendOn(cuda::MakeEmulatedDevice(int64_t{1} << 30, has_warpgroups), options);
}

// How a device attends, and whether it is an sm_90a.
constexpr std::pair<CudaPrecision, bool> kCudaKernels[] = {
    {CudaPrecision::kExact, false}, {CudaPrecision::kTensor, false}, {CudaPrecision::kTensor, true}};

// Why this machine cannot run the cuda backend; OK where it can.
const absl::Status& CudaMissing() {
  static const absl::Status* const status = new absl::Status(MakeCudaBackend(0, SmallCuda(1)).status());
  return *status;
}

std::vector<BackendChoice> AllBackends() {
  std::vector<BackendChoice> all = {{"reference", [](int) { return MakeReferenceBackend(); }}};
  for (const std::string& target : CpuTargets()) {
    all.push_back({"cpu_" + target, [target](int threads) { return MakeCpuBackendForTest(threads, target); },
                   CpuTargetHasFma(target)});
  }
  // The chip's dot products, where it has them, and targets with and without fused multiply-add by their own
  // means.
  BackendChoice rounded = {"cpu_bf16",
                           [](int threads) { return MakeCpuBackend(threads, Activations::kBf16); },
                           CpuTargetHasFma(CpuTargets().front())};
  rounded.is_rounded = true;
  all.push_back(rounded);
  for (const std::string& target : CpuTargets()) {
    if (target != "AVX2" && target != "SSE4") continue;
    rounded.name = "cpu_bf16_" + target;
    rounded.make = [target](int threads) { return RoundedCpu(threads, target); };
    rounded.fused = CpuTargetHasFma(target);
    all.push_back(rounded);
  }
  if (cuda::EmulatedDeviceRuns()) {
    all.push_back({"cuda_emulated", [](int threads) { return EmulatedCuda(SmallCuda(threads)); }});
    all.push_back({"cuda_emulated_tensor",
                   [](int threads) { return EmulatedCuda(SmallCuda(threads, CudaPrecision::kTensor)); },
                   /*fused=*/true, /*is_tensor=*/true});
    all.push_back({"cuda_emulated_wgmma",
                   [](int threads) {
                     return EmulatedCuda(SmallCuda(threads, CudaPrecision::kTensor),
                                         /*has_warpgroups=*/true);
                   },
                   /*fused=*/true, /*is_tensor=*/true, /*is_rounded=*/false, /*is_warpgroup=*/true});
  }
  all.push_back({"cuda", [](int threads) { return *MakeCudaBackend(0, SmallCuda(threads)); }});
  all.push_back({"cuda_tensor",
                 [](int threads) { return *MakeCudaBackend(0, SmallCuda(threads, CudaPrecision::kTensor)); },
                 /*fused=*/true, /*is_tensor=*/true});
  all.back().is_warpgroup = CudaMissing().ok() && all.back().make(1)->name().starts_with("cuda/sm_90");
  return all;
}

RankGroup Group(const BackendChoice& choice, int ranks, int threads = 1) {
  std::vector<std::unique_ptr<Backend>> backends;
  backends.reserve(ranks);
  for (int i = 0; i < ranks; ++i) backends.push_back(choice.make(threads));
  return RankGroup(std::move(backends));
}

RankGroup GroupOf(std::unique_ptr<Backend> backend) {
  std::vector<std::unique_ptr<Backend>> backends;
  backends.push_back(std::move(backend));
  return RankGroup(std::move(backends));
}

// Every spec of this stream differs, and is the same on every run.
ProblemSpec RandomSpec(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[random() % sizeof...(options)];
  };
  ProblemSpec spec;
  spec.seed = seed;
  spec.shape.kv_heads = pick(1, 1, 2, 3);
  spec.shape.query_heads = spec.shape.kv_heads * pick(1, 2, 3, 4, 5, 7, 8, 40);
  spec.shape.head_dim = pick(1, 3, 16, 55, 64, 80, 96, 128, 256);
  spec.shape.value_dim = pick(1, 10, 16, 64, 130, spec.shape.head_dim);
  spec.shape.key_dtype = spec.shape.value_dtype = pick(DType::kF32, DType::kBf16, DType::kF16);
  spec.shape.scale = pick(1.0F, 0.125F, 0.0883883F, -0.5F);
  spec.shape.softcap = pick(0.0F, 0.0F, 0.0F, 30.0F);
  spec.rows = pick(1, 1, 2, 3, 7, 20, 70);
  spec.positions = pick(1, 2, 255, 256, 257, 300, 700, 1300);
  spec.sink_tokens = pick(0, 0, 1, 4, 128, 300);
  if (random() % 2 == 0) spec.sink_logit = pick(-30.0F, 0.0F, 3.0F, 30.0F, 300.0F);
  spec.logit_size = pick(1.0F, 5.0F, 20.0F);
  spec.sink_pull = pick(0.0F, 0.3F, -0.3F, 2.0F);
  spec.values = pick(Values::kNormal, Values::kNormal, Values::kMixed);
  spec.visible =
      pick(Visible::kAll, Visible::kCausal, Visible::kRandom, Visible::kWindow, Visible::kOneOrNone);
  spec.partly_visible_sinks = pick(false, true);
  if (spec.rows * spec.shape.query_heads > 400) spec.rows = 3;
  return spec;
}

std::ostream& operator<<(std::ostream& out, const BackendChoice& choice) { return out << choice.name; }

class BackendContract : public testing::TestWithParam<BackendChoice> {
 protected:
  void SetUp() override {
    if (!GetParam().IsEmulated() && GetParam().name.starts_with("cuda") && !CudaMissing().ok()) {
      GTEST_SKIP() << "SKIPPED, NOT TESTED: cuda: " << CudaMissing();
    }
  }
};

INSTANTIATE_TEST_SUITE_P(All, BackendContract, testing::ValuesIn(AllBackends()),
                         [](const auto& info) { return info.param.name; });

TEST(Backends, AreTheOnesThisBuildPromises) {
#if defined(__x86_64__)
  std::vector<std::string> built = BuiltCpuTargets();
  ASSERT_EQ(built.size(), 4U) << testing::PrintToString(built);
  EXPECT_THAT(std::vector<std::string>(built.begin(), built.begin() + 3),
              testing::ElementsAre("AVX3", "AVX2", "SSE4"));
  EXPECT_THAT(
      built[3],
      testing::AnyOf("SCALAR", "EMU128"));  // The portable baseline; which one depends on the compiler.
  // A missing target must not look like a pass.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  EXPECT_THAT(CpuTargets(), testing::Contains(built[3]));
  EXPECT_EQ(testing::Value(CpuTargets(), testing::Contains("AVX2")), avx2);
  EXPECT_EQ(testing::Value(CpuTargets(), testing::Contains("AVX3")), avx512);
#endif
  EXPECT_EQ(MakeReferenceBackend()->name(), "reference");
  EXPECT_EQ(MakeCpuBackend(1)->name(), "cpu/" + CpuTargets().front());
  EXPECT_EQ(MakeCpuBackend(1, Activations::kBf16)->name(), "cpu/" + CpuTargets().front() + "/bf16");
}

TEST_P(BackendContract, RandomProblemsMatchTheDefinition) {
  RankGroup group = Group(GetParam(), 2);
  for (uint64_t seed = 1; seed <= 250; ++seed) {
    const ProblemSpec spec = RandomSpec(seed);
    SCOPED_TRACE(spec.ToString());
    const Problem problem = GetParam().MakeProblem(spec);
    group.Load(problem);
    const auto answer = group.Attend(problem, {0, 1});
    ASSERT_TRUE(answer.ok()) << answer.status();
    const DenseResult oracle = problem.Oracle();
    // Channel by channel, as channels of very different sizes would hide in a common norm.
    EXPECT_LE(WorstError(answer->outputs, oracle.outputs, problem.Magnitudes(), 1),
              GetParam().Error(spec.shape.key_dtype));
    const double logit_error = GetParam().LogitError(spec.shape.key_dtype);
    for (size_t i = 0; i < oracle.lse.size(); ++i) {
      if (std::isinf(oracle.lse[i])) {
        EXPECT_EQ(answer->lse[i], oracle.lse[i]);
      } else {
        EXPECT_NEAR(answer->lse[i], oracle.lse[i], logit_error * (3 + std::abs(oracle.lse[i])));
      }
      EXPECT_NEAR(answer->sink_mass[i], oracle.sink_mass[i], 3 * logit_error);
    }
    if (HasFailure()) return;
  }
}

// Everything that must not change a bit: the number of ranks, who owns which page, and in which order a rank
// has its pages.
TEST_P(BackendContract, AnyPlacementGivesTheSameBits) {
  RankGroup group = Group(GetParam(), 8);
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    const ProblemSpec spec = RandomSpec(seed);
    SCOPED_TRACE(spec.ToString());
    const Problem problem(spec);
    group.Load(problem);
    const auto alone = group.Attend(problem, {0});
    ASSERT_TRUE(alone.ok()) << alone.status();
    const std::vector<int64_t> words = group.words();
    for (const std::vector<int>& owners :
         {std::vector<int>{7}, {0, 1}, {2, 1, 0}, {0, 0, 3, 1, 4}, {0, 1, 2, 3, 4, 5, 6, 7}}) {
      for (const bool reversed : {false, true}) {
        const auto split = group.Attend(problem, owners, reversed);
        ASSERT_TRUE(split.ok()) << split.status();
        ASSERT_TRUE(*split == *alone)
            << "owners " << testing::PrintToString(owners) << " reversed " << reversed;
        EXPECT_EQ(split->bytes_read, alone->bytes_read);
      }
    }
    EXPECT_EQ(words.empty(), group.words().empty());
  }
}

TEST_P(BackendContract, ARowsBitsAreTheSameAloneAndInABatch) {
  RankGroup group = Group(GetParam(), 1);
  for (uint64_t seed = 2000; seed < 2060; ++seed) {
    ProblemSpec spec = RandomSpec(seed);
    if (spec.rows == 1) spec.rows = 5;
    SCOPED_TRACE(spec.ToString());
    const Problem problem(spec);
    group.Load(problem);
    const auto batch = group.Attend(problem, {0});
    ASSERT_TRUE(batch.ok()) << batch.status();
    const auto per_row = static_cast<size_t>(spec.shape.query_heads) * spec.shape.value_dim;
    std::mt19937_64 random(seed);
    for (int trial = 0; trial < 4; ++trial) {
      std::vector<int> rows;
      const int count = trial == 0 ? 1 : 1 + static_cast<int>(random() % spec.rows);
      rows.reserve(count);
      for (int i = 0; i < count; ++i) rows.push_back(static_cast<int>(random() % spec.rows));
      const auto some = group.Attend(problem.WithRows(rows), {0});
      ASSERT_TRUE(some.ok()) << some.status();
      for (size_t i = 0; i < rows.size(); ++i) {
        ASSERT_EQ(std::memcmp(&some->outputs[i * per_row], &batch->outputs[rows[i] * per_row],
                              per_row * sizeof(float)),
                  0)
            << "row " << rows[i] << " of batch " << testing::PrintToString(rows);
        const auto heads = static_cast<size_t>(spec.shape.query_heads);
        ASSERT_EQ(std::memcmp(&some->lse[i * heads], &batch->lse[rows[i] * heads], heads * sizeof(float)), 0);
      }
    }
  }
}

// Steps of all kinds in progress at once: none notices the others, nor whether all ranks answer it.
TEST_P(BackendContract, AStepsBitsAreTheSameAloneAndAmongOthersInProgress) {
  RankGroup group = Group(GetParam(), 2, 2);
  for (uint64_t seed = 8000; seed < 8030; ++seed) {
    ProblemSpec spec = RandomSpec(seed);
    SCOPED_TRACE(spec.ToString());
    const Problem problem(spec);
    group.Load(problem);
    std::mt19937_64 random(seed);
    std::vector<Problem> problems;
    for (int i = 0; i < 4; ++i) {
      std::vector<int> rows(1 + random() % spec.rows);
      for (int& row : rows) row = static_cast<int>(random() % spec.rows);
      problems.push_back(problem.WithRows(rows));
      // On the maximum path, without sinks at all, or as they come.
      if (i == 1) problems[i].sink_logits.assign(spec.shape.query_heads, -300.0F);
      if (i == 2) {
        problems[i].sink_logits.clear();
        problems[i].spec.sink_tokens = 0;
        std::fill(problems[i].visible_sinks.begin(), problems[i].visible_sinks.end(), 0);
      }
    }
    for (const bool one_answers : {false, true}) {
      group.one_answers = one_answers;
      const auto together = group.AttendTogether(problems, {0, 1});
      ASSERT_TRUE(together.ok()) << together.status();
      group.one_answers = false;
      for (size_t i = 0; i < problems.size(); ++i) {
        const auto alone = group.Attend(problems[i], {0, 1});
        ASSERT_TRUE(alone.ok()) << alone.status();
        ASSERT_TRUE((*together)[i] == *alone) << "step " << i << ", one answers: " << one_answers;
        EXPECT_EQ((*together)[i].bytes_read, alone->bytes_read);
      }
    }
  }
}

// Against queries of zeros, any sink is a sink with a key of zeros.
TEST_P(BackendContract, TokenSinksAreScoredWithTheirOwnQueries) {
  RankGroup group = Group(GetParam(), 2);
  for (uint64_t seed = 6000; seed < 6030; ++seed) {
    ProblemSpec spec = RandomSpec(seed);
    spec.sink_tokens = std::max(1, spec.sink_tokens);
    SCOPED_TRACE(spec.ToString());
    Problem problem(spec);
    problem.sink_queries.assign(problem.queries.size(), 0);
    group.Load(problem);
    const auto answer = group.Attend(problem, {0, 1});
    ASSERT_TRUE(answer.ok()) << answer.status();
    Problem judge = problem;
    judge.sink_queries.clear();
    const int64_t sinks = std::min<int64_t>(spec.sink_tokens, spec.positions);
    std::fill_n(judge.keys.begin(), sinks * spec.shape.kv_heads * spec.shape.head_dim, 0.0F);
    group.Load(judge);
    const auto wanted = group.Attend(judge, {0, 1});
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    ASSERT_TRUE(*answer == *wanted);
  }
}

// Takes away rows of the problem: random live masks (some of whole pages, or of their first and last rows),
// and for each row a list of other pages and rows.
void AddHoles(Problem& problem, uint64_t seed, bool with_lists) {
  std::mt19937_64 random(seed);
  const int64_t sinks = std::min<int64_t>(problem.spec.sink_tokens, problem.spec.positions);
  for (int64_t page = 0; page < PageCount(problem.spec.positions); ++page) {
    RowSet live;
    const uint64_t kind = random() % 4;
    if (kind == 0) continue;  // Without a mask.
    if (kind == 1) live.Add(1, kPageRows - 1);
    for (uint64_t& word : live.words) {
      if (kind == 2) word = random() | random();
    }
    live.Add(0, sinks - PageBegin(page));  // Kind 3: nothing else.
    problem.live[page] = live;
  }
  for (int row = 0; with_lists && row < problem.spec.rows; ++row) {
    std::map<int64_t, PageRows> listed;
    for (int64_t page = 0; page < PageCount(problem.spec.positions); ++page) {
      if (random() % 3 == 0) continue;
      const auto begin = static_cast<int16_t>(random() % 2 == 0 ? 0 : random() % 200);
      listed[page] = {begin, static_cast<int16_t>(random() % 2 == 0 ? kPageRows : begin + random() % 57)};
    }
    problem.listed.push_back(listed);
  }
}

// Load puts NaN where no row sees anything, so dead rows that had an influence would show.
TEST_P(BackendContract, RowsThatListsAndMasksLeaveOutAreNotThere) {
  RankGroup group = Group(GetParam(), 2);
  for (uint64_t seed = 9000; seed < 9060; ++seed) {
    const ProblemSpec spec = RandomSpec(seed);
    SCOPED_TRACE(spec.ToString());
    Problem problem = GetParam().MakeProblem(spec);
    AddHoles(problem, seed, seed % 3 != 0);
    group.Load(problem);
    const auto answer = group.Attend(problem, {0, 1});
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_LE(WorstError(answer->outputs, problem.Oracle().outputs, problem.Magnitudes(), 1),
              GetParam().Error(spec.shape.key_dtype));
    // Dead rows of other content, and pages without a live row left out of every list.
    Problem other = problem;
    for (int64_t j = 0; j < spec.positions; ++j) {
      const auto mask = problem.live.find(PageOf(j));
      if (mask == problem.live.end() || mask->second.Has(static_cast<int>(j % kPageRows))) continue;
      const int64_t keys = int64_t{spec.shape.kv_heads} * spec.shape.head_dim;
      const int64_t values = int64_t{spec.shape.kv_heads} * spec.shape.value_dim;
      std::fill_n(&other.keys[j * keys], keys, 7.0F);
      std::fill_n(&other.values[j * values], values, -9.0F);
    }
    for (auto& listed : other.listed) {
      for (const auto& [page, live] : other.live) {
        if (live.count() == 0) listed.erase(page);
      }
    }
    // Written as if everything were live, so that the dead rows hold the other content.
    Problem written = other;
    written.live.clear();
    written.listed.clear();
    group.Load(written);
    const auto again = group.Attend(other, {1, 0});
    ASSERT_TRUE(again.ok()) << again.status();
    ASSERT_TRUE(*again == *answer);
    EXPECT_EQ(again->bytes_read, answer->bytes_read);
    // Alone, a row has one list and other neighbours.
    const auto alone = group.Attend(other.WithRows({spec.rows - 1}), {0});
    ASSERT_TRUE(alone.ok()) << alone.status();
    const size_t count = alone->outputs.size();
    ASSERT_EQ(
        std::memcmp(alone->outputs.data(), &answer->outputs[(spec.rows - 1) * count], count * sizeof(float)),
        0);
  }
}

TEST_P(BackendContract, KeysAndValuesMayHaveDifferentTypes) {
  RankGroup group = Group(GetParam(), 1);
  for (const DType key_dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const DType value_dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      if (key_dtype != value_dtype && GetParam().name.starts_with("cuda")) continue;  // UNIMPLEMENTED.
      ProblemSpec spec = RandomSpec(9100);
      spec.shape.key_dtype = key_dtype;
      spec.shape.value_dtype = value_dtype;
      SCOPED_TRACE(spec.ToString());
      const Problem problem = GetParam().MakeProblem(spec);
      group.Load(problem);
      const auto answer = group.Attend(problem, {0});
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_LE(WorstError(answer->outputs, problem.Oracle().outputs, problem.Magnitudes(), 1),
                GetParam().Error(key_dtype));
    }
  }
}

TEST(StepArgs, AListThatNamesAPageTwiceIsRefused) {
  const std::unique_ptr<Backend> backend = MakeReferenceBackend();
  StepArgs args;
  const float one = 1;
  const PageRef pages[] = {{nullptr, 0}};
  const PositionRange visible[] = {{0, 1}};
  const int16_t exponents[] = {0};
  args.rows = 1;
  args.queries = &one;
  args.pages = pages;
  args.visible = visible;
  args.exponents = exponents;
  args.positions = 1;
  OwnedPageLists lists;
  lists.AddRow(lists.AddList({{0, 0, 10}, {0, 20, 30}}));
  args.lists = lists.view();
  const absl::Status status = backend->StartStep(args).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("names page 0 twice"), std::string::npos) << status;
}

// A page that is sealed is written no more, until its memory is another page's; a copy of it may be.
TEST(StepArgs, ASealedPageIsNotWritten) {
  for (const bool is_reference : {true, false}) {
    const std::unique_ptr<Backend> backend = is_reference ? MakeReferenceBackend() : MakeCpuBackend(1);
    const AttentionShape shape;
    const int64_t bytes = backend->PageBytes(shape);
    char* const pages = static_cast<char*>(*backend->AllocateSlab(2 * bytes));
    const float one = 1;
    ASSERT_EQ(backend->WriteRows(shape, pages, 0, 1, &one, &one), absl::OkStatus());
    ASSERT_EQ(backend->SealPage(shape, pages), absl::OkStatus());
    EXPECT_DEATH(backend->WriteRows(shape, pages, 1, 1, &one, &one).IgnoreError(), "is_sealed");
    ASSERT_EQ(backend->CopyPage(shape, pages, pages + bytes), absl::OkStatus());
    EXPECT_EQ(backend->WriteRows(shape, pages + bytes, 1, 1, &one, &one), absl::OkStatus());
    ASSERT_EQ(backend->ResetPage(pages), absl::OkStatus());
    EXPECT_EQ(backend->WriteRows(shape, pages, 1, 1, &one, &one), absl::OkStatus());
    backend->FreeSlab(pages, 2 * bytes);
  }
}

TEST_P(BackendContract, RowsComeBackAsTheyWereWritten) {
  const std::unique_ptr<Backend> backend = GetParam().make(1);
  for (uint64_t seed = 7000; seed < 7040; ++seed) {
    const AttentionShape shape = RandomSpec(seed).shape;
    std::mt19937_64 random(seed);
    const int64_t bytes = backend->PageBytes(shape);
    void* page = *backend->AllocateSlab(bytes);
    const auto element = static_cast<int64_t>(DTypeBytes(shape.key_dtype));
    const int64_t key_row = int64_t{shape.kv_heads} * shape.head_dim * element;
    const int64_t value_row = int64_t{shape.kv_heads} * shape.value_dim * element;
    // Any bits, NaN among them.
    std::vector<char> keys(kPageRows * key_row);
    std::vector<char> values(kPageRows * value_row);
    for (char& byte : keys) byte = static_cast<char>(random());
    for (char& byte : values) byte = static_cast<char>(random());
    for (int row = 0; row < kPageRows;) {
      const int rows = std::min<int>(kPageRows - row, 1 + static_cast<int>(random() % 90));
      ASSERT_EQ(backend->WriteRows(shape, page, row, rows, &keys[row * key_row], &values[row * value_row]),
                absl::OkStatus());
      row += rows;
    }
    for (const auto& [row, rows] : {std::pair(0, kPageRows), std::pair(255, 1), std::pair(17, 100)}) {
      std::vector<char> read_keys(rows * key_row);
      std::vector<char> read_values(rows * value_row);
      ASSERT_EQ(backend->ReadRows(shape, page, row, rows, read_keys.data(), read_values.data()),
                absl::OkStatus());
      EXPECT_EQ(std::memcmp(read_keys.data(), &keys[row * key_row], read_keys.size()), 0) << "seed " << seed;
      EXPECT_EQ(std::memcmp(read_values.data(), &values[row * value_row], read_values.size()), 0)
          << "seed " << seed;
    }
    backend->FreeSlab(page, bytes);
  }
}

TEST_P(BackendContract, AStepThatIsCalledOffSaysSo) {
  const std::unique_ptr<Backend> backend = GetParam().make(1);
  StepArgs args;
  const int64_t bytes = backend->PageBytes(args.shape);
  void* page = *backend->AllocateSlab(bytes);
  const float one = 1;
  ASSERT_EQ(backend->WriteRows(args.shape, page, 0, 1, &one, &one), absl::OkStatus());
  const PageRef pages[] = {{page, 0}};
  const PositionRange visible[] = {{0, 1}};
  const int16_t exponents[] = {0};
  std::atomic<bool> cancelled = true;
  args.rows = 1;
  args.queries = &one;
  args.pages = pages;
  const OwnedPageLists lists(1, 1);
  args.lists = lists.view();
  args.visible = visible;
  args.exponents = exponents;
  args.positions = 1;
  args.cancelled = &cancelled;
  {
    const auto step = backend->StartStep(args);
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_EQ((*step)->Attend().code(), absl::StatusCode::kCancelled);
  }
  cancelled = false;
  {
    const auto step = backend->StartStep(args);
    ASSERT_TRUE(step.ok()) << step.status();
    EXPECT_EQ((*step)->Attend(), absl::OkStatus());
    EXPECT_EQ((*step)->SelectForMaximum()->size(), 1U);
    std::vector<float> maxima(2);
    EXPECT_EQ((*step)->Maxima(absl::MakeSpan(maxima)), absl::OkStatus());
    EXPECT_EQ(maxima[0], 1);
    cancelled = true;
    std::vector<int64_t> words(3);
    EXPECT_EQ((*step)->MaximumSums(absl::MakeSpan(words)).code(), absl::StatusCode::kCancelled);
  }
  backend->FreeSlab(page, bytes);
}

TEST_P(BackendContract, ThreadsDoNotChangeABit) {
  RankGroup one = Group(GetParam(), 1, 1);
  RankGroup three = Group(GetParam(), 1, 3);
  for (uint64_t seed = 3000; seed < 3060; ++seed) {
    const ProblemSpec spec = RandomSpec(seed);
    SCOPED_TRACE(spec.ToString());
    const Problem problem(spec);
    one.Load(problem);
    three.Load(problem);
    const auto a = one.Attend(problem, {0});
    const auto b = three.Attend(problem, {0});
    ASSERT_TRUE(a.ok() && b.ok());
    ASSERT_TRUE(*a == *b);
    ASSERT_EQ(one.words(), three.words());
  }
}

// Partials kept, or computed again for every pass, or kept of some of the steps in progress.
TEST(CpuBackend, RecomputedPartialsGiveTheSameBits) {
  for (const std::string& target : CpuTargets()) {
    for (const Activations activations : {Activations::kF32, Activations::kBf16}) {
      const auto group_with = [&](int64_t bytes) {
        return GroupOf(MakeCpuBackendForTest(2, target, bytes, activations));
      };
      RankGroup kept = group_with(kKeptPartialsBytesMax);
      RankGroup recomputed = group_with(0);
      RankGroup some = group_with(int64_t{64} << 10);
      for (uint64_t seed = 4000; seed < 4040; ++seed) {
        const ProblemSpec spec = RandomSpec(seed);
        SCOPED_TRACE(spec.ToString());
        const Problem problem(spec);
        kept.Load(problem);
        recomputed.Load(problem);
        some.Load(problem);
        const auto a = kept.Attend(problem, {0});
        const auto b = recomputed.Attend(problem, {0});
        const auto c =
            some.AttendTogether({problem, problem.WithRows({0}), problem, problem.WithRows({0})}, {0});
        ASSERT_TRUE(a.ok() && b.ok() && c.ok());
        ASSERT_TRUE(*a == *b);
        ASSERT_EQ(kept.words(), recomputed.words());
        ASSERT_TRUE((*c)[0] == *a && (*c)[2] == *a && (*c)[1] == (*c)[3]);
      }
    }
  }
}

// Random problems, of `dtype` where it is given.
void ExpectSameBits(std::unique_ptr<Backend> first, std::unique_ptr<Backend> second,
                    std::optional<DType> dtype) {
  const std::string names = absl::StrCat(first->name(), " and ", second->name());
  RankGroup a = GroupOf(std::move(first));
  RankGroup b = GroupOf(std::move(second));
  for (uint64_t seed = 5000; seed < 5100; ++seed) {
    ProblemSpec spec = RandomSpec(seed);
    if (dtype) spec.shape.key_dtype = spec.shape.value_dtype = *dtype;
    SCOPED_TRACE(absl::StrCat(names, ": ", spec.ToString()));
    const Problem problem(spec);
    a.Load(problem);
    b.Load(problem);
    const auto from_a = a.Attend(problem, {0});
    const auto from_b = b.Attend(problem, {0});
    ASSERT_TRUE(from_a.ok() && from_b.ok());
    ASSERT_TRUE(*from_a == *from_b);
    ASSERT_EQ(a.words(), b.words());
  }
}

TEST(CpuBackend, TargetsThatFuseMultiplyAndAddAgreeBitForBit) {
  for (const bool fma : {true, false}) {
    std::vector<std::string> targets;
    for (const std::string& target : CpuTargets()) {
      if (CpuTargetHasFma(target) == fma) targets.push_back(target);
    }
    for (size_t i = 1; i < targets.size(); ++i) {
      ExpectSameBits(MakeCpuBackendForTest(1, targets[0]), MakeCpuBackendForTest(1, targets[i]),
                     std::nullopt);
      ExpectSameBits(RoundedCpu(1, targets[0]), RoundedCpu(1, targets[i]), DType::kBf16);
    }
  }
}

TEST(CpuBackend, RoundedProductsGiveTheBitsOfTheChipsDotProducts) {
  if (ScoreDotsOfTheChip() == nullptr) GTEST_SKIP() << "SKIPPED, NOT TESTED: this chip has no VDPBF16PS";
  ExpectSameBits(MakeCpuBackend(1, Activations::kBf16), RoundedCpu(1, CpuTargets().front()), DType::kBf16);
}

// Queries and keys below the normal numbers count as zeros, because the chip's dot products take them
// so.
TEST(CpuBackend, RoundedProductsTakeSubnormalNumbersForZerosOnEveryTargetThatFuses) {
  ProblemSpec spec;
  spec.shape = {2, 1, 19, 20, DType::kBf16, DType::kBf16, 1, 0};
  spec.positions = 300;
  spec.rows = 3;
  Problem problem(spec);
  for (size_t i = 0; i < problem.queries.size(); i += 3) problem.queries[i] = 0x1p-130F;
  for (size_t i = 0; i < problem.keys.size(); i += 2) problem.keys[i] = i % 4 == 0 ? 0x1p-131F : 0x1p120F;
  std::fill(problem.queries.begin() + 1, problem.queries.begin() + 19, 0x1p-127F);
  for (const std::string& target : CpuTargets()) {
    if (CpuTargetHasFma(target) != CpuTargetHasFma(CpuTargets().front())) continue;
    RankGroup group = GroupOf(RoundedCpu(1, target));
    RankGroup chip = GroupOf(MakeCpuBackend(1, Activations::kBf16));
    group.Load(problem);
    chip.Load(problem);
    const auto answer = group.Attend(problem, {0});
    const auto wanted = chip.Attend(problem, {0});
    ASSERT_TRUE(answer.ok() && wanted.ok()) << answer.status() << wanted.status();
    EXPECT_TRUE(*answer == *wanted) << target;
    EXPECT_EQ(group.words(), chip.words()) << target;
  }
}

// The GPU backends that this machine runs.
std::vector<BackendChoice> CudaBackends() {
  std::vector<BackendChoice> some;
  for (const BackendChoice& choice : AllBackends()) {
    if (choice.name == "cuda_emulated" || (choice.name == "cuda" && CudaMissing().ok())) {
      some.push_back(choice);
    }
  }
  return some;
}

// Chips, and ways to compute on one, must not meet in a group: their fingerprints are how it knows. Each of
// them checks, too, that a row's bits are the same alone and among seven.
TEST(CudaBackend, ItsFingerprintTellsHowItComputes) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const auto exact = EmulatedCuda(SmallCuda(1));
  const auto tensor = EmulatedCuda(SmallCuda(1, CudaPrecision::kTensor));
  const auto exact_print = Fingerprint(*exact);
  const auto tensor_print = Fingerprint(*tensor);
  ASSERT_TRUE(exact_print.ok() && tensor_print.ok()) << exact_print.status() << tensor_print.status();
  EXPECT_NE(*exact_print, *tensor_print);
  const auto warpgroup_print =
      Fingerprint(*EmulatedCuda(SmallCuda(1, CudaPrecision::kTensor), /*has_warpgroups=*/true));
  ASSERT_TRUE(warpgroup_print.ok()) << warpgroup_print.status();
  EXPECT_NE(*warpgroup_print, *tensor_print);
  EXPECT_EQ(tensor->name(), exact->name() + "/tensor");
}

// What the tensor cores multiply has to be what the queries are, however large or small they are.
TEST_P(BackendContract, QueriesOfAnySizeKeepTheirDigits) {
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    for (const float size : {1e-30F, 1e-6F, 1.0F, 1e6F, 1e30F}) {
      RankGroup group = Group(GetParam(), 1);
      ProblemSpec spec;
      spec.shape = {4, 2, 64, 64, dtype, dtype, 0.125F, 0};
      spec.rows = 5;
      spec.logit_size = 5;
      SCOPED_TRACE(absl::StrCat("size=", size, " ", spec.ToString()));
      // By a power of two, so that queries that are rounded already stay so.
      const float factor = std::exp2(std::round(std::log2(size)));
      Problem problem = GetParam().MakeProblem(spec);
      for (float& q : problem.queries) q *= factor;
      problem.spec.shape.scale /= factor;
      group.Load(problem);
      const auto answer = group.Attend(problem, {0});
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_LE(WorstError(answer->outputs, problem.Oracle().outputs, problem.Magnitudes(), 1),
                GetParam().Error(dtype));
    }
  }
}

// Tensor cores may leave out what a query's second term is where it is zero: for a row alone, and not among
// others that have one.
TEST_P(BackendContract, ARowOf16BitQueriesHasTheSameBitsAloneAndAmongOthers) {
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    RankGroup group = Group(GetParam(), 1);
    ProblemSpec spec;
    spec.shape = {4, 2, 72, 24, dtype, dtype, 0.125F, 0};
    spec.rows = 5;
    spec.positions = 600;
    spec.sink_logit = 1;
    Problem problem(spec);
    const size_t width = problem.queries.size() / spec.rows;
    for (size_t i = 2 * width; i < 3 * width; ++i) {
      problem.queries[i] = F32FromBf16(Bf16FromF32(std::round(problem.queries[i] * 16)));
    }
    SCOPED_TRACE(spec.ToString());
    group.Load(problem);
    const auto alone = group.Attend(problem.WithRows({2}), {0});
    const auto among = group.Attend(problem.WithRows({0, 2, 4}), {0});
    ASSERT_TRUE(alone.ok() && among.ok()) << alone.status() << among.status();
    const size_t outputs = alone->outputs.size();
    EXPECT_EQ(std::memcmp(alone->outputs.data(), &among->outputs[outputs], outputs * sizeof(float)), 0);
    EXPECT_EQ(
        std::memcmp(alone->lse.data(), &among->lse[alone->lse.size()], alone->lse.size() * sizeof(float)), 0);
  }
}

// Steps of more query vectors than a block takes, or than it has room to add up for, go other ways.
TEST_P(BackendContract, RowsOfAStepOfAnySizeHaveTheBitsOfEachAlone) {
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    for (const auto& [dim, rows, is_16_bit] :
         {std::tuple(128, 9, true), std::tuple(128, 9, false), std::tuple(256, 5, false)}) {
      RankGroup group = Group(GetParam(), 1);
      ProblemSpec spec;
      spec.shape = {16, 2, dim, dim, dtype, dtype, 0.125F, 0};
      spec.rows = rows;
      spec.positions = 600;
      spec.sink_logit = 1;
      spec.visible = Visible::kCausal;
      Problem problem = GetParam().MakeProblem(spec);
      for (size_t i = 0; is_16_bit && i < problem.queries.size(); ++i) {
        problem.queries[i] = F32FromBf16(Bf16FromF32(problem.queries[i]));
      }
      SCOPED_TRACE(spec.ToString());
      group.Load(problem);
      const auto all = group.Attend(problem, {0});
      ASSERT_TRUE(all.ok()) << all.status();
      EXPECT_EQ(all->paths.maximum, 0);
      for (const int row : {0, rows / 2, rows - 1}) {
        const auto alone = group.Attend(problem.WithRows({row}), {0});
        ASSERT_TRUE(alone.ok()) << alone.status();
        const size_t count = alone->outputs.size();
        EXPECT_EQ(std::memcmp(alone->outputs.data(), &all->outputs[row * count], count * sizeof(float)), 0)
            << row;
      }
    }
  }
}

// Wherever it happens in a page, and whichever path the row takes: an error that names the row, on the rank
// that has the page, and no answer on any.
TEST_P(BackendContract, ArithmeticThatIsNotFiniteIsAnErrorOfItsRow) {
  constexpr float kHuge = 3e38F;
  enum class What { kLargeLogit, kSmallLogit, kNoLogit, kValueSum };
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    for (const What what : {What::kLargeLogit, What::kSmallLogit, What::kNoLogit, What::kValueSum}) {
      // In double nothing of that size is too large.
      const bool is_finite_in_double = what == What::kNoLogit || what == What::kValueSum;
      if (is_finite_in_double && GetParam().name == "reference") continue;
      for (const bool has_sink : {false, true}) {
        ProblemSpec spec;
        spec.shape = {2, 1, 32, 40, dtype, dtype, 1, 0};
        spec.rows = 2;
        spec.positions = 600;
        if (has_sink) spec.sink_logit = 1;
        Problem problem(spec);
        const int head_dim = spec.shape.head_dim;
        // Row 0 sees another page, and so does head 0 of row 1 see nothing amiss.
        problem.visible[0] = {0, 200};
        float* const query = &problem.queries[3 * head_dim];
        float* const key = &problem.keys[300 * head_dim];
        for (size_t i = 0; i < problem.queries.size(); i += head_dim) {
          problem.queries[i] = problem.queries[i + 16] = 0;
        }
        for (size_t i = 0; i < problem.keys.size(); i += head_dim) problem.keys[i] = problem.keys[i + 16] = 0;
        std::fill_n(query, head_dim, 0.0F);
        std::fill_n(key, head_dim, 0.0F);
        if (what == What::kLargeLogit || what == What::kNoLogit) query[0] = key[0] = kHuge;
        // In another product of 16 dimensions, so that infinities meet.
        if (what == What::kSmallLogit || what == What::kNoLogit) query[16] = -(key[16] = kHuge);
        if (what == What::kValueSum) {
          // Only the last channel is that large, and there is more of it than the head that weighs its keys
          // can add up.
          for (int position = 300; position < 310; ++position) {
            problem.values[position * spec.shape.value_dim + spec.shape.value_dim - 1] = kHuge;
          }
          std::fill(problem.exponents.begin(), problem.exponents.end(), int16_t{128});
          // The other channels' sums are so large that the units are fine enough: nothing but the fault
          // itself takes the row from the sink path.
          std::fill_n(&problem.values[300 * spec.shape.value_dim], spec.shape.value_dim - 1, 1e38F);
          // Head 0 hardly weighs them.
          for (int position = 0; position < 600; ++position) problem.keys[position * head_dim + 1] = 0;
          for (int position = 300; position < 310; ++position) problem.keys[position * head_dim + 1] = -80;
          problem.queries[2 * head_dim + 1] = 1;
        }
        SCOPED_TRACE(absl::StrCat("what=", static_cast<int>(what), " sink=", has_sink, " ", spec.ToString()));
        for (const auto& owners : {std::vector<int>{0}, std::vector<int>{1, 0}}) {
          RankGroup group = Group(GetParam(), static_cast<int>(owners.size()));
          group.Load(problem);
          const auto answer = group.Attend(problem, owners);
          EXPECT_EQ(answer.status().code(), absl::StatusCode::kInvalidArgument) << answer.status();
          EXPECT_NE(answer.status().message().find("query row 1, head 1"), std::string::npos)
              << answer.status();
        }
      }
    }
  }
}

// A total of 2^64 and a little, in units of the sink path: a sum that went on beyond 2^56 would come round to
// a harmless number. A GPU's blocks take all pages of a head here, or every other: the rest weighs nothing.
TEST_P(BackendContract, ATotalThatWouldComeRoundLeavesTheSinkPath) {
  ProblemSpec spec;
  spec.shape = {7, 7, 1, 1, DType::kBf16, DType::kBf16, 1, 0};
  spec.positions = 2 * 257 * kPageRows;
  // A page's 256 keys weigh a little less than 2^10.
  spec.sink_logit = 0;
  Problem problem(spec);
  std::fill(problem.sink_logits.begin(), problem.sink_logits.end(), std::nextafter(-std::log(4.0F), 0.0F));
  std::fill(problem.queries.begin(), problem.queries.end(), 1.0F);
  for (size_t i = 0; i < problem.keys.size(); ++i) {
    const size_t page = i / spec.shape.kv_heads / kPageRows;
    problem.keys[i] = page % 2 == 0 ? 0 : -100;
  }
  std::fill(problem.values.begin(), problem.values.end(), 1.0F);
  std::fill(problem.exponents.begin(), problem.exponents.end(), int16_t{0});
  RankGroup group = Group(GetParam(), 1);
  group.Load(problem);
  const auto answer = group.Attend(problem, {0});
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->paths.maximum, 7);
  for (const float out : answer->outputs) EXPECT_FLOAT_EQ(out, 65792 / 65792.25F);
}

// Where fp32 numbers are so far apart that rounding a logit makes or breaks a weight: equal keys weigh the
// same, none more than 1, and the sums of many ranks stay in range.
TEST_P(BackendContract, EqualKeysOfHugeLogitsWeighTheSame) {
  RankGroup group = Group(GetParam(), 8);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const float size : {1e5F, 3e7F, 1e8F, 1e10F, 1e15F, 1e30F}) {
      for (int seed = 0; seed < 6; ++seed) {
        ProblemSpec spec;
        spec.seed = seed + 1;
        spec.shape = {2, 1, 3, 2, dtype, dtype, 0.37F, 0};
        spec.positions = 8 * kPageRows - 1;
        if (seed % 3 == 2) spec.sink_logit = 1;
        Problem problem(spec);
        for (float& q : problem.queries) q *= size * (seed % 2 == 0 ? 1 : -1);
        for (size_t i = 3; i < problem.keys.size(); ++i) problem.keys[i] = problem.keys[i - 3];
        for (size_t i = 0; i < problem.values.size(); ++i) problem.values[i] = i % 2 == 0 ? 1 : -2;
        SCOPED_TRACE(absl::StrCat("size=", size, " ", spec.ToString()));
        group.Load(problem);
        const auto alone = group.Attend(problem, {0});
        const auto shared = group.Attend(problem, {0, 1, 2, 3, 4, 5, 6, 7});
        ASSERT_TRUE(alone.ok() && shared.ok()) << alone.status() << shared.status();
        EXPECT_TRUE(*alone == *shared);
        if (alone->sink_mass[0] > 0 || alone->sink_mass[1] > 0) continue;  // The keys weigh nothing.
        for (size_t i = 0; i < alone->outputs.size(); ++i) {
          EXPECT_NEAR(alone->outputs[i], i % 2 == 0 ? 1 : -2, 1e-3);
        }
      }
    }
  }
}

// A channel may hold nothing but values of keys that weigh little beside the others of their page.
TEST_P(BackendContract, LightWeightsKeepTheirDigits) {
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    for (const float distance : {7.0F, 12.0F, 15.0F, 17.0F, 20.0F}) {
      RankGroup group = Group(GetParam(), 1);
      ProblemSpec spec;
      spec.shape = {1, 1, 16, 16, dtype, dtype, 1, 0};
      spec.positions = 2;
      Problem problem(spec);
      std::fill(problem.queries.begin(), problem.queries.end(), 0.0F);
      std::fill(problem.keys.begin(), problem.keys.end(), 0.0F);
      problem.queries[0] = 1;
      problem.keys[0] = distance;
      for (int c = 0; c < 16; ++c) {
        problem.values[c] = static_cast<float>(c % 2);
        problem.values[16 + c] = 1;
      }
      SCOPED_TRACE(absl::StrCat("distance=", distance, " ", spec.ToString()));
      group.Load(problem);
      const auto answer = group.Attend(problem, {0});
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_LE(WorstError(answer->outputs, problem.Oracle().outputs, problem.Magnitudes(), 1),
                GetParam().Error(dtype));
    }
  }
}

// The same operations in the same order: a session may move between CPUs and GPUs.
TEST(CudaBackend, GivesTheBitsOfTheCpusThatFuseMultiplyAndAdd) {
  for (const std::string& target : CpuTargets()) {
    if (!CpuTargetHasFma(target)) continue;
    for (const BackendChoice& choice : CudaBackends()) {
      RankGroup cpu = GroupOf(MakeCpuBackendForTest(1, target));
      RankGroup gpu = Group(choice, 1);
      for (uint64_t seed = 6000; seed < 6100; ++seed) {
        const ProblemSpec spec = RandomSpec(seed);
        SCOPED_TRACE(absl::StrCat(target, " and ", choice.name, ": ", spec.ToString()));
        const Problem problem(spec);
        cpu.Load(problem);
        gpu.Load(problem);
        const auto from_cpu = cpu.Attend(problem, {0});
        const auto from_gpu = gpu.Attend(problem, {0});
        ASSERT_TRUE(from_cpu.ok() && from_gpu.ok()) << from_cpu.status() << from_gpu.status();
        ASSERT_TRUE(*from_cpu == *from_gpu);
        ASSERT_EQ(cpu.words(), gpu.words());
      }
    }
  }
}

// All partials at once, or as much as there is room for, computed again for every pass.
TEST(CudaBackend, StepsInPartsGiveTheSameBits) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  CudaOptions little = SmallCuda(1);
  little.partial_bytes = int64_t{2} << 20;  // One page, or a few.
  for (const auto& [precision, has_warpgroups] : kCudaKernels) {
    little.precision = precision;
    RankGroup whole = GroupOf(EmulatedCuda(SmallCuda(1, precision), has_warpgroups));
    RankGroup parts = GroupOf(EmulatedCuda(little, has_warpgroups));
    for (uint64_t seed = 7000; seed < 7060; ++seed) {
      const ProblemSpec spec = RandomSpec(seed);
      SCOPED_TRACE(spec.ToString());
      const Problem problem(spec);
      whole.Load(problem);
      parts.Load(problem);
      const auto a = whole.Attend(problem, {0});
      const auto b = parts.Attend(problem, {0});
      ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
      ASSERT_TRUE(*a == *b);
      ASSERT_EQ(whole.words(), parts.words());
    }
  }
}

TEST(CudaBackend, AStepThatTheDeviceHasNoRoomForIsRefused) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  CudaOptions options = SmallCuda(1);
  options.partial_bytes = 4096;
  RankGroup group = GroupOf(EmulatedCuda(options));
  ProblemSpec spec;
  spec.rows = 20;
  spec.shape.query_heads = 4;
  spec.shape.value_dim = 64;
  const Problem problem(spec);
  group.Load(problem);
  EXPECT_EQ(group.Attend(problem, {0}).status().code(), absl::StatusCode::kResourceExhausted);
  options.page_bytes = int64_t{2} << 30;
  EXPECT_EQ(MakeCudaBackendOn(cuda::MakeEmulatedDevice(int64_t{1} << 30), options).status().code(),
            absl::StatusCode::kResourceExhausted);
}

ProblemSpec SmallSpecOfBothPaths() {
  ProblemSpec spec;
  spec.shape.query_heads = 2;
  spec.shape.head_dim = 16;
  spec.shape.value_dim = 16;
  spec.shape.key_dtype = spec.shape.value_dtype = DType::kBf16;
  spec.sink_tokens = 4;
  spec.sink_logit = -30.0F;  // Some heads take the maximum path.
  return spec;
}

// Whatever call a device fails in, there is an error that says so, and never an answer.
TEST(CudaBackend, ADeviceThatFailsIsUnavailableFromThenOn) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const Problem problem(SmallSpecOfBothPaths());
  for (const auto& [precision, has_warpgroups] : kCudaKernels) {
    bool survived = false;
    for (int calls = 0; !survived; ++calls) {
      ASSERT_LT(calls, 200);
      auto device = cuda::MakeEmulatedDevice(int64_t{1} << 30, has_warpgroups);
      cuda::Device& broken = *device;
      CudaOptions options;
      options.partial_bytes = int64_t{1} << 20;
      options.precision = precision;
      RankGroup group = GroupOf(*MakeCudaBackendOn(std::move(device), options));
      group.Load(problem);
      cuda::BreakEmulatedDevice(broken, calls);
      const auto answer = group.Attend(problem, {0});
      survived = answer.ok();
      if (!survived) {
        EXPECT_FALSE(group.backend(0).health().ok());
        EXPECT_EQ(answer.status().code(), absl::StatusCode::kUnavailable) << answer.status();
        EXPECT_EQ(group.Attend(problem, {0}).status().code(), absl::StatusCode::kUnavailable);
      }
    }
  }
}

// A launch may find no memory. That call ends, and nothing else: what comes later is as ever.
TEST(CudaBackend, ACallWithoutMemoryIsRefusedAndTheNextIsAnswered) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const Problem problem(SmallSpecOfBothPaths());
  for (const auto& [precision, has_warpgroups] : kCudaKernels) {
    auto device = cuda::MakeEmulatedDevice(int64_t{1} << 30, has_warpgroups);
    cuda::Device& full = *device;
    RankGroup group = GroupOf(*MakeCudaBackendOn(std::move(device), SmallCuda(1, precision)));
    group.Load(problem);
    const auto wanted = group.Attend(problem, {0});
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    int refused = 0;
    while (true) {
      ASSERT_LT(refused, 200);
      cuda::ExhaustEmulatedDevice(full, refused);
      const auto answer = group.Attend(problem, {0});
      ASSERT_EQ(group.backend(0).health(), absl::OkStatus());
      if (answer.ok()) break;
      ++refused;
      EXPECT_EQ(answer.status().code(), absl::StatusCode::kResourceExhausted) << answer.status();
      const auto again = group.Attend(problem, {0});
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_TRUE(*again == *wanted) << "after call " << refused;
    }
    EXPECT_GT(refused, 5);
  }
}

// Takes all that a device has left, in pieces of 256 bytes and more.
class AllMemory {
 public:
  explicit AllMemory(cuda::Device& device) : device_(device) {
    for (int64_t bytes = int64_t{1} << 30; bytes >= 256; bytes /= 2) {
      while (true) {
        const auto taken = device.AllocateDevice(bytes);
        if (!taken.ok()) break;
        taken_.push_back(*taken);
      }
    }
  }
  ~AllMemory() {
    for (void* const data : taken_) device_.FreeDevice(data);
  }
  AllMemory(const AllMemory&) = delete;
  AllMemory& operator=(const AllMemory&) = delete;

 private:
  cuda::Device& device_;
  std::vector<void*> taken_;
};

// Slabs, rows in and out, pages copied: whatever their sizes are, all memory for them was there at the start.
TEST(CudaBackend, PagesNeedNoMoreMemoryOfTheDevice) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(int64_t{1} << 30);
  const std::unique_ptr<Backend> backend = *MakeCudaBackendOn(device, SmallCuda(1));
  const AllMemory nothing_left(*device);
  AttentionShape wide;  // A page of 24 MiB: neither its rows nor its heads are staged at once.
  wide.query_heads = wide.kv_heads = 12;
  wide.head_dim = wide.value_dim = 1024;
  wide.key_dtype = wide.value_dtype = DType::kF32;
  for (const AttentionShape& shape : {AttentionShape(), wide}) {
    const int64_t row_bytes = int64_t{shape.kv_heads} * shape.head_dim * DTypeBytes(shape.key_dtype);
    std::vector<char> keys(kPageRows * row_bytes);
    std::vector<char> values(keys.size());
    std::minstd_rand random(1);
    for (char& byte : keys) byte = static_cast<char>(random());
    for (char& byte : values) byte = static_cast<char>(random());
    const int64_t bytes = backend->PageBytes(shape);
    const auto page = backend->AllocateSlab(bytes);
    const auto copy = backend->AllocateSlab(bytes);
    ASSERT_TRUE(page.ok() && copy.ok()) << page.status() << copy.status();
    // From several threads, so that every slot has some.
    ThreadPool(8).ParallelFor(8, [&](int64_t i, int) {
      const auto row = static_cast<int>(i * kPageRows / 8);
      EXPECT_EQ(backend->WriteRows(shape, *page, row, kPageRows / 8, &keys[row * row_bytes],
                                   &values[row * row_bytes]),
                absl::OkStatus());
    });
    ASSERT_EQ(backend->CopyPage(shape, *page, *copy), absl::OkStatus());
    std::vector<char> read_keys(keys.size());
    std::vector<char> read_values(keys.size());
    ASSERT_EQ(backend->ReadRows(shape, *copy, 0, kPageRows, read_keys.data(), read_values.data()),
              absl::OkStatus());
    EXPECT_TRUE(read_keys == keys && read_values == values);
    backend->FreeSlab(*page, bytes);
    backend->FreeSlab(*copy, bytes);
  }
}

// Rows of another page come in while a step is queued, and before it has begun.
TEST(CudaBackend, UploadsDoNotWaitForSteps) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(int64_t{1} << 30);
  const std::unique_ptr<Backend> backend = *MakeCudaBackendOn(device, SmallCuda(1));
  StepArgs args;
  const int64_t bytes = backend->PageBytes(args.shape);
  void* const page = *backend->AllocateSlab(bytes);
  void* const other = *backend->AllocateSlab(bytes);
  const float one = 1;
  ASSERT_EQ(backend->WriteRows(args.shape, page, 0, 1, &one, &one), absl::OkStatus());
  const PageRef pages[] = {{page, 0}};
  const PositionRange visible[] = {{0, 1}};
  const int16_t exponents[] = {0};
  const float sink_logits[] = {0};
  const int32_t visible_sinks[] = {0};
  args.rows = 1;
  args.queries = &one;
  args.pages = pages;
  const OwnedPageLists lists(1, 1);
  args.lists = lists.view();
  args.visible = visible;
  args.visible_sinks = visible_sinks;
  args.sink_logits = sink_logits;
  args.exponents = exponents;
  args.positions = 1;
  const auto step = backend->StartStep(args);
  ASSERT_TRUE(step.ok()) << step.status();
  ASSERT_EQ((*step)->Attend(), absl::OkStatus());
  // An emulated device's memory is the host's.
  constexpr int64_t kUntouched = -7;
  std::vector<int64_t> words(args.words_per_row_head(), kUntouched);
  ASSERT_EQ((*step)->queued()->QueueSums(words.data()), absl::OkStatus());

  ASSERT_EQ(backend->WriteRows(args.shape, other, 0, 1, &one, &one), absl::OkStatus());
  float key = 0;
  float value = 0;
  ASSERT_EQ(backend->ReadRows(args.shape, other, 0, 1, &key, &value), absl::OkStatus());
  EXPECT_EQ(key, 1);
  EXPECT_EQ(value, 1);
  EXPECT_EQ(words, std::vector<int64_t>(words.size(), kUntouched));

  ASSERT_EQ(device->Synchronize(backend->stream()), absl::OkStatus());
  EXPECT_GT(words[0], 0);
  EXPECT_GT(words[1], 0);
}

// A page that is nowhere is an illegal address to the kernel: CUDA's error, not a test's. Runs in a process
// of its own, whose device is lost. The exit code tells what went wrong.
[[noreturn]] void LoseADevice() {
  const auto backend = MakeCudaBackend(0, SmallCuda(1));
  if (!backend.ok()) std::exit(1);
  StepArgs args;
  const float one = 1;
  const PageRef pages[] = {{std::bit_cast<const void*>(uintptr_t{1} << 40), 0}};
  const PositionRange visible[] = {{0, 1}};
  const int16_t exponents[] = {0};
  args.rows = 1;
  args.queries = &one;
  args.pages = pages;
  const OwnedPageLists lists(1, 1);
  args.lists = lists.view();
  args.visible = visible;
  args.exponents = exponents;
  args.positions = 1;
  const auto step = (*backend)->StartStep(args);
  if (!step.ok()) std::exit(2);
  absl::Status status = (*step)->Attend();
  if (status.ok()) status = (*step)->SelectForMaximum().status();
  std::vector<float> maxima(2);
  if (status.ok()) status = (*step)->Maxima(absl::MakeSpan(maxima));
  if (!absl::IsUnavailable(status)) std::exit(3);
  if ((*backend)->health().ok()) std::exit(4);
  if (!absl::IsUnavailable((*backend)->StartStep(args).status())) std::exit(5);
  if (!absl::IsUnavailable((*backend)->AllocateSlab(4096).status())) std::exit(6);
  std::exit(0);
}

TEST(CudaBackend, AnErrorOfCudaIsUnavailableFromThenOn) {
  if (!CudaMissing().ok()) GTEST_SKIP() << "SKIPPED, NOT TESTED: cuda: " << CudaMissing();
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(LoseADevice(), testing::ExitedWithCode(0), "");
}

TEST(CudaBackend, NamesOfDevices) {
  EXPECT_EQ(*CudaDeviceIndex("cuda"), 0);
  EXPECT_EQ(*CudaDeviceIndex("cuda:7"), 7);
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1x", "cuda0"}) {
    EXPECT_EQ(CudaDeviceIndex(name).status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST(CudaBackend, AnAbsentDeviceIsAClearError) {
  const absl::Status status = MakeCudaBackend(4711, SmallCuda(1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_EQ(std::string(status.message()).find('\n'), std::string::npos);
}

ProblemSpec AccuracySpec(int head_dim, int64_t positions, float logit_size, uint64_t seed) {
  ProblemSpec spec;
  spec.seed = seed;
  spec.shape = {/*query_heads=*/4,
                /*kv_heads=*/2,
                head_dim,
                /*value_dim=*/64,
                DType::kBf16,
                DType::kBf16,
                1 / std::sqrt(static_cast<float>(head_dim)),
                0};
  spec.rows = positions > 100000 ? 1 : 8;
  spec.positions = positions;
  spec.logit_size = logit_size;
  return spec;
}

TEST_P(BackendContract, ErrorStaysWithin3e6ForModerateLogits) {
  const double bound = GetParam().Error(DType::kBf16);
  RankGroup group = Group(GetParam(), 1);
  double worst = 0;
  for (const int head_dim : {16, 64, 128, 256}) {
    for (const int64_t positions : {1, 2, 5, 30, 300, 3000, 20000}) {
      if (GetParam().IsEmulated() && positions > 3000) continue;  // A host emulates a GPU slowly.
      // Sink mass from 1e-9 to 1 - 1e-7, and none.
      for (const float sink : {-1000.0F, -15.0F, 0.0F, 18.0F, 33.0F}) {
        ProblemSpec spec = AccuracySpec(head_dim, positions, 20, positions + head_dim);
        if (sink > -1000) spec.sink_logit = sink;
        SCOPED_TRACE(spec.ToString());
        const Problem problem = GetParam().MakeProblem(spec);
        group.Load(problem);
        const auto answer = group.Attend(problem, {0});
        ASSERT_TRUE(answer.ok()) << answer.status();
        const DenseResult oracle = problem.Oracle();
        const double error =
            WorstError(answer->outputs, oracle.outputs, oracle.outputs, spec.shape.value_dim);
        worst = std::max(worst, error);
        EXPECT_LE(error, bound);
      }
    }
  }
  RecordProperty("worst_relative_error", absl::StrCat(worst));
}

// A fixed-point sum has to share its bits among all sizes of values in a channel. One huge value must not
// cost the others theirs: neither where no row sees it, nor where it is seen and weighs next to nothing.
TEST_P(BackendContract, AHugeValueThatHardlyCountsCostsNoPrecision) {
  RankGroup group = Group(GetParam(), 2);
  for (const float huge : {1e6F, 1e9F, 1e12F, 1e20F, 1e38F}) {
    for (const bool seen : {false, true}) {
      for (const std::optional<float> sink :
           {std::optional<float>(), std::optional<float>(3), std::optional<float>(9)}) {
        ProblemSpec spec = AccuracySpec(64, 3000, 5, 7);
        spec.shape.key_dtype = spec.shape.value_dtype = DType::kF32;
        spec.rows = 1;
        spec.shape.query_heads = spec.shape.kv_heads;  // So that a key can be far from all queries.
        spec.sink_logit = sink;
        Problem problem(spec);
        // The last position's values are huge; its logits, where it is seen, are about -100.
        const int64_t last = spec.positions - 1;
        const AttentionShape& shape = spec.shape;
        for (int head = 0; head < shape.kv_heads; ++head) {
          const float* query = &problem.queries[static_cast<int64_t>(head) * shape.head_dim];
          double norm = 0;
          for (int d = 0; d < shape.head_dim; ++d) norm += static_cast<double>(query[d]) * query[d];
          for (int d = 0; d < shape.head_dim; ++d) {
            problem.keys[(last * shape.kv_heads + head) * shape.head_dim + d] =
                static_cast<float>(-100 / shape.scale / norm) * query[d];
          }
          for (int c = 0; c < shape.value_dim; ++c) {
            problem.values[(last * shape.kv_heads + head) * shape.value_dim + c] = c % 2 == 0 ? huge : -huge;
          }
        }
        std::fill(problem.exponents.begin(), problem.exponents.end(),
                  static_cast<int16_t>(std::ceil(std::log2(huge))));
        if (!seen) problem.visible[0].end = last;
        SCOPED_TRACE(absl::StrCat("huge=", huge, " seen=", seen, " ", spec.ToString()));
        group.Load(problem);
        const auto answer = group.Attend(problem, {0, 1});
        ASSERT_TRUE(answer.ok()) << answer.status();
        const DenseResult oracle = problem.Oracle();
        EXPECT_LE(WorstError(answer->outputs, oracle.outputs, oracle.outputs, shape.value_dim), 3e-6);
      }
    }
  }
}

TEST_P(BackendContract, ErrorIsNeverAbovePlainFloatAttentionForExtremeLogits) {
  if (GetParam().is_tensor || GetParam().is_rounded) {
    GTEST_SKIP() << "rounded factors promise nothing for extreme logits";
  }
  constexpr int kSeeds = 8;
  RankGroup group = Group(GetParam(), 1);
  for (const int head_dim : {16, 64, 128, 256}) {
    for (const float logit_size : {20.0F, 60.0F, 150.0F, 300.0F, 1000.0F, 30000.0F}) {
      double worst = 0;
      double typical = 0;
      double plain_worst = 0;
      double plain_typical = 0;
      for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
        const ProblemSpec spec = AccuracySpec(head_dim, 2000, logit_size, seed);
        SCOPED_TRACE(spec.ToString());
        const Problem problem(spec);
        group.Load(problem);
        const auto answer = group.Attend(problem, {0});
        ASSERT_TRUE(answer.ok()) << answer.status();
        const DenseResult oracle = problem.Oracle();
        const std::vector<float> plain = problem.PlainFloatAttention(GetParam().fused);
        worst = std::max(worst, WorstError(answer->outputs, oracle.outputs, oracle.outputs, 64));
        plain_worst = std::max(plain_worst, WorstError(plain, oracle.outputs, oracle.outputs, 64));
        typical += TypicalError(answer->outputs, oracle.outputs, oracle.outputs, 64) / kSeeds;
        plain_typical += TypicalError(plain, oracle.outputs, oracle.outputs, 64) / kSeeds;
      }
      SCOPED_TRACE(absl::StrCat("head_dim=", head_dim, " logit_size=", logit_size));
      EXPECT_LE(worst, plain_worst);
      EXPECT_LE(typical, plain_typical);
    }
  }
}

}  // namespace
}  // namespace eduba
