#include "attention/sharded_attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "attention/page_store.h"
#include "attention/staged_append.h"
#include "base/check.h"
#include "base/testing/same_bits.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/local/local_communicator.h"
#include "collective/map_rendezvous.h"
#include "collective/testing/counting_communicator.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/page_lists.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/testing/forwarding_backend.h"

namespace eduba {
namespace {

// One random problem: a sequence and queries on it. Everything follows from the seed.
struct Problem {
  uint64_t seed = 0;
  bool cpu = false;  // Which backend.
  SequenceSpec spec;
  int64_t length = 0;
  int layer = 0;
  Policy policy = Policy::kGlobal;
  int rows = 0;
  float logit_size = 0;
  float logit_shift = 0;       // Added to every logit of a key or token sink (before softcap).
  std::vector<float> keys;     // [layers, length, kv_heads, head_dim], in the stored type's numbers
  std::vector<float> values;   // [layers, length, kv_heads, value_dim]
  std::vector<float> queries;  // [rows, query_heads, head_dim]
  std::vector<int64_t> positions;

  std::string Text() const {
    return absl::StrCat("seed=", seed, cpu ? " cpu" : " reference", " {length=", length, " layer=", layer,
                        "/", spec.layers, " heads=", spec.shape.query_heads, "/", spec.shape.kv_heads,
                        " dims=", spec.shape.head_dim, "/", spec.shape.value_dim,
                        " dtype=", DTypeName(spec.shape.key_dtype), " sinks=", spec.sink_tokens,
                        " learned=", spec.sink_logits.size(), " window=", spec.window,
                        " policy=", policy == Policy::kGlobal ? "global" : "window", " rows=", rows,
                        " softcap=", spec.shape.softcap, " logits=", logit_size, "+", logit_shift, "}");
  }
};

Problem MakeProblem(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int64_t n) { return static_cast<int64_t>(random() % n); };
  std::normal_distribution<float> normal;
  Problem p;
  p.seed = seed;
  p.cpu = below(2) == 0;
  AttentionShape& shape = p.spec.shape;
  shape.kv_heads = static_cast<int>(1 + below(3));
  shape.query_heads = shape.kv_heads * static_cast<int>(1 + below(3));
  shape.head_dim = static_cast<int>(1 + below(12));
  shape.value_dim = static_cast<int>(1 + below(12));
  shape.key_dtype = shape.value_dtype = static_cast<DType>(below(3));
  shape.softcap = below(4) == 0 ? 5.0f : 0.0f;
  p.spec.layers = static_cast<int>(1 + below(2));
  p.spec.sink_tokens = below(3) == 0 ? 0 : below(400);
  p.spec.window = 1 + below(600);
  if (below(2) == 0) {
    for (int h = 0; h < shape.query_heads; ++h) p.spec.sink_logits.push_back(3 * normal(random));
  }
  p.length = 1 + below(below(2) == 0 ? 300 : 2500);
  p.layer = static_cast<int>(below(p.spec.layers));
  p.policy = below(2) == 0 ? Policy::kGlobal : Policy::kWindow;
  p.rows = static_cast<int>(1 + below(6));
  // Small logits stay on the sink path, large ones take the maximum path.
  const float sizes[] = {0.1f, 1.0f, 4.0f, 20.0f};
  p.logit_size = sizes[below(4)];
  shape.scale = p.logit_size / std::sqrt(static_cast<float>(shape.head_dim));
  const auto stored = [&shape](float x) {
    uint32_t element = 0;
    StoreElement(&element, shape.key_dtype, 0, x);
    return LoadElement(&element, shape.key_dtype, 0);
  };
  p.keys.resize(p.spec.layers * p.length * shape.kv_heads * shape.head_dim);
  p.values.resize(p.spec.layers * p.length * shape.kv_heads * shape.value_dim);
  p.queries.resize(int64_t{p.rows} * shape.query_heads * shape.head_dim);
  for (float& x : p.keys) x = stored(normal(random));
  const float value_size = std::ldexp(1.0f, static_cast<int>(below(20)) - 10);
  for (float& x : p.values) x = stored(value_size * normal(random));
  for (float& x : p.queries) x = normal(random);
  // Far from 0, a rank that answers 0 where it has nothing to say would be heard.
  const float shifts[] = {0, 0, -60, 60};
  p.logit_shift = shifts[below(4)];
  if (p.logit_shift != 0) {
    for (size_t i = 0; i < p.keys.size(); i += shape.head_dim) p.keys[i] = 4;
    for (size_t i = 0; i < p.queries.size(); i += shape.head_dim) {
      p.queries[i] = p.logit_shift / (4 * shape.scale);
    }
  }
  p.positions.reserve(p.rows);
  for (int r = 0; r < p.rows; ++r) p.positions.push_back(below(2) == 0 ? p.length - 1 : below(p.length));
  return p;
}

DenseResult Oracle(const Problem& p) {
  const AttentionShape& shape = p.spec.shape;
  DenseAttention dense;
  dense.rows = p.rows;
  dense.query_heads = shape.query_heads;
  dense.kv_heads = shape.kv_heads;
  dense.head_dim = shape.head_dim;
  dense.value_dim = shape.value_dim;
  dense.scale = shape.scale;
  dense.softcap = shape.softcap;
  dense.queries = p.queries;
  const int64_t key_row = int64_t{shape.kv_heads} * shape.head_dim;
  const int64_t value_row = int64_t{shape.kv_heads} * shape.value_dim;
  dense.keys.assign(p.keys.begin() + p.layer * p.length * key_row,
                    p.keys.begin() + (p.layer + 1) * p.length * key_row);
  dense.values.assign(p.values.begin() + p.layer * p.length * value_row,
                      p.values.begin() + (p.layer + 1) * p.length * value_row);
  dense.sink_logits = p.spec.sink_logits;
  dense.sink_tokens = static_cast<int>(p.spec.sink_tokens);
  dense.sees = [&p](int row, int64_t j) {
    const int64_t q = p.positions[row];
    return j <= q && (p.policy == Policy::kGlobal || j < p.spec.sink_tokens || q - p.spec.window < j);
  };
  return ReferenceAttention(dense);
}

// The same content on some number of workers, each a thread with its own backend, store and sequence.
class Cluster {
 public:
  // Places stripes of `stripe_pages` pages round robin, and appends the first `length` positions (-1: all) in
  // random chunks.
  Cluster(const Problem& problem, int ranks, int64_t stripe_pages, std::mt19937_64& random,
          int64_t length = -1)
      : problem_(problem), ranks_(ranks) {
    for (int rank = 0; rank < ranks; ++rank) {
      // Threads are no part of an answer either.
      backends_.push_back(problem.cpu ? MakeCpuBackend(1 + rank % 2) : MakeReferenceBackend());
      stores_.push_back(std::make_unique<PageStore>(backends_.back().get(), int64_t{1} << 30));
      sequences_.push_back(std::make_unique<Sequence>(problem.spec));
    }
    if (length < 0) length = problem.length;
    for (int64_t at = 0; at < length;) {
      const int64_t n = std::min<int64_t>(length - at, 1 + static_cast<int64_t>(random() % 1500));
      Append(at, n, stripe_pages);
      at += n;
    }
  }

  // All ranks' answers, or the errors.
  std::vector<absl::StatusOr<AttentionAnswer>> Attend(const AttentionQuery& query) {
    std::vector<absl::StatusOr<AttentionAnswer>> answers(ranks_);
    std::vector<std::thread> threads;
    threads.reserve(ranks_);
    for (int rank = 0; rank < ranks_; ++rank) {
      threads.emplace_back([&, rank] {
        const absl::Time deadline = absl::Now() + absl::Seconds(60);
        auto communicator = hub_.Join(epoch_, 1, rank, ranks_, deadline);
        if (!communicator.ok()) {
          answers[rank] = communicator.status();
          return;
        }
        Backend& backend = wrap ? *wrap(rank, *backends_[rank]) : *backends_[rank];
        answers[rank] = AttendSharded(backend, **communicator, *sequences_[rank], query, deadline);
      });
    }
    for (std::thread& thread : threads) thread.join();
    ++epoch_;
    return answers;
  }

  Backend& backend(int rank) { return *backends_[rank]; }
  const Sequence& sequence(int rank) const { return *sequences_[rank]; }

  // A backend to use in place of a rank's own.
  std::function<Backend*(int rank, Backend& own)> wrap;

  void Append(int64_t at, int64_t n, int64_t stripe_pages) {
    std::vector<std::shared_ptr<StagedAppend>> appends;
    std::vector<int16_t> exponents(problem_.spec.exponents(), kNoExponent);
    for (int rank = 0; rank < ranks_; ++rank) {
      std::vector<PositionRange> owned;
      for (int64_t stripe = StripeOf(at, stripe_pages); stripe <= StripeOf(at + n - 1, stripe_pages);
           ++stripe) {
        if (stripe % ranks_ != rank) continue;
        const int64_t rows = stripe_pages * kPageRows;
        owned.push_back(PositionRange{stripe * rows, (stripe + 1) * rows}.Intersect({at, at + n}));
      }
      auto append = StagedAppend::Begin(backends_[rank].get(), stores_[rank].get(), sequences_[rank].get(),
                                        {.at = at, .count = n, .owned = owned, .compare_only = false});
      EXPECT_TRUE(append.ok()) << append.status();
      const PositionRange sinks = PositionRange{at, at + n}.Intersect({0, problem_.spec.sink_tokens});
      for (int layer = 0; layer < problem_.spec.layers; ++layer) {
        if (!sinks.empty()) Send(**append, layer, sinks);
        for (PositionRange range : owned) {
          range.begin = std::max(range.begin, std::min(range.end, sinks.end));
          if (!range.empty()) Send(**append, layer, range);
        }
      }
      const auto seal = (*append)->Seal();
      EXPECT_TRUE(seal.ok()) << seal.status();
      for (size_t i = 0; i < exponents.size(); ++i) exponents[i] = std::max(exponents[i], seal->exponents[i]);
      appends.push_back(*append);
    }
    for (const auto& append : appends) EXPECT_EQ(append->Publish(exponents), absl::OkStatus());
  }

 private:
  void Send(StagedAppend& append, int layer, PositionRange range) const {
    const AttentionShape& shape = problem_.spec.shape;
    const int64_t key_row = int64_t{shape.kv_heads} * shape.head_dim;
    const int64_t value_row = int64_t{shape.kv_heads} * shape.value_dim;
    const int64_t row = layer * problem_.length + range.begin;
    const auto bytes = [](const float* data, int64_t count) {
      return absl::Span<const char>(reinterpret_cast<const char*>(data), count * sizeof(float));
    };
    EXPECT_EQ(append.AddRows(layer, range.begin, range.size(), DType::kF32,
                             bytes(problem_.keys.data() + row * key_row, range.size() * key_row),
                             bytes(problem_.values.data() + row * value_row, range.size() * value_row)),
              absl::OkStatus());
  }

  const Problem& problem_;
  const int ranks_;
  LocalHub hub_;
  uint64_t epoch_ = 1;
  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<std::unique_ptr<PageStore>> stores_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
};

AttentionQuery QueryOf(const Problem& p) {
  AttentionQuery query;
  query.layer = p.layer;
  query.policy = p.policy;
  query.length = p.length;
  query.queries = p.queries;
  query.positions = p.positions;
  return query;
}

void CompareWithOracle(const Problem& p, const AttentionAnswer& answer) {
  const DenseResult oracle = Oracle(p);
  // Logits of normal queries and keys reach three times their size; fp32 rounds them relative to that.
  const double tolerance = 1e-6 * (1 + 0.2 * p.logit_size + 0.1 * std::abs(p.logit_shift));
  const int value_dim = p.spec.shape.value_dim;
  for (int64_t i = 0; i < int64_t{p.rows} * p.spec.shape.query_heads; ++i) {
    double error = 0;
    double norm = 0;
    for (int c = 0; c < value_dim; ++c) {
      const double wanted = oracle.outputs[i * value_dim + c];
      error += std::pow(answer.outputs[i * value_dim + c] - wanted, 2);
      norm += wanted * wanted;
    }
    // Values of both signs can cancel; the error is bounded relative to their size, not to the sum's.
    double size = 0;
    for (const float v : p.values) size = std::max<double>(size, std::abs(v));
    ASSERT_LE(std::sqrt(error), tolerance * (std::sqrt(norm) + size)) << "row and head " << i;
    ASSERT_NEAR(answer.lse[i], oracle.lse[i], 1e-5 * (1 + std::abs(oracle.lse[i]))) << "row and head " << i;
    ASSERT_NEAR(answer.sink_mass[i], oracle.sink_mass[i], tolerance) << "row and head " << i;
  }
}

TEST(ShardedAttention, AnyRanksStripesChunksAndBatchesGiveTheSameBytes) {
  int64_t sink_path = 0;
  int64_t maximum_path = 0;
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    const Problem p = MakeProblem(seed);
    SCOPED_TRACE(p.Text());
    std::mt19937_64 random(seed + 1000000);
    AttentionAnswer first;
    for (const int ranks : {1, 2, 3, 5, 8}) {
      const int64_t stripe_pages = 1 + static_cast<int64_t>(random() % 4);
      SCOPED_TRACE(absl::StrCat("ranks=", ranks, " stripe_pages=", stripe_pages));
      Cluster cluster(p, ranks, stripe_pages, random);
      const auto answers = cluster.Attend(QueryOf(p));
      for (const auto& answer : answers) {
        ASSERT_TRUE(answer.ok()) << answer.status();
        if (ranks == 1) first = *answer;
        ASSERT_TRUE(SameBits(answer->outputs, first.outputs));
        ASSERT_TRUE(SameBits(answer->lse, first.lse));
        ASSERT_TRUE(SameBits(answer->sink_mass, first.sink_mass));
        ASSERT_EQ(answer->row_heads_maximum, first.row_heads_maximum);
        ASSERT_EQ(answer->collectives, first.collectives);
      }
      if (ranks == 1) {
        ASSERT_NO_FATAL_FAILURE(CompareWithOracle(p, first));
      }
      // One row alone.
      const int row = static_cast<int>(random() % p.rows);
      Problem single = p;
      const int64_t query_row = int64_t{p.spec.shape.query_heads} * p.spec.shape.head_dim;
      const int64_t output_row = int64_t{p.spec.shape.query_heads} * p.spec.shape.value_dim;
      single.rows = 1;
      single.queries.assign(p.queries.begin() + row * query_row, p.queries.begin() + (row + 1) * query_row);
      single.positions = {p.positions[row]};
      const auto alone = cluster.Attend(QueryOf(single));
      ASSERT_TRUE(alone[0].ok()) << alone[0].status();
      ASSERT_TRUE(SameBits(alone[0]->outputs, absl::MakeConstSpan(first.outputs)
                                                  .subspan(static_cast<size_t>(row * output_row),
                                                           static_cast<size_t>(output_row))));
    }
    for (const int32_t heads : first.row_heads_maximum) {
      maximum_path += heads;
      sink_path += p.spec.shape.query_heads - heads;
    }
  }
  // Both paths were there to be wrong.
  EXPECT_GT(sink_path, 20);
  EXPECT_GT(maximum_path, 20);
}

// A call's rows all see the length that was committed when it began, also those that run after a later
// append.
TEST(ShardedAttention, ALaterAppendDoesNotChangeABitOfAQueryOnTheEarlierLength) {
  for (uint64_t seed = 100; seed < 110; ++seed) {
    Problem p = MakeProblem(seed);
    if (p.length < 2) continue;
    p.spec.shape.key_dtype = p.spec.shape.value_dtype =
        DType::kF32;  // Holds what the others hold, and the larger values below.
    SCOPED_TRACE(p.Text());
    const int64_t earlier = p.length / 2;
    // Larger values later, so that their exponents, and with them the rounding of the sums, differ.
    const int64_t value_row = int64_t{p.spec.shape.kv_heads} * p.spec.shape.value_dim;
    for (int layer = 0; layer < p.spec.layers; ++layer) {
      for (int64_t i = earlier * value_row; i < p.length * value_row; ++i) {
        p.values[layer * p.length * value_row + i] *= 0x1p40f;
      }
    }
    for (int64_t& position : p.positions) position = std::min(position, earlier - 1);
    AttentionQuery query = QueryOf(p);
    query.length = earlier;
    std::mt19937_64 random(seed);
    Cluster cluster(p, 2, 1, random, earlier);
    const auto before = cluster.Attend(query);
    cluster.Append(earlier, p.length - earlier, 1);
    const auto after = cluster.Attend(query);
    ASSERT_TRUE(before[0].ok() && after[0].ok()) << before[0].status() << after[0].status();
    EXPECT_TRUE(SameBits(after[0]->outputs, before[0]->outputs));
    EXPECT_TRUE(SameBits(after[0]->lse, before[0]->lse));
  }
}

TEST(ShardedAttention, BytesReadAddUpToTheVisibleRowsOnce) {
  Problem p = MakeProblem(3);
  p.policy = Policy::kGlobal;
  std::fill(p.positions.begin(), p.positions.end(), p.length - 1);
  std::mt19937_64 random(1);
  int64_t one = 0;
  for (const int ranks : {1, 3}) {
    Cluster cluster(p, ranks, 1, random);
    int64_t bytes = 0;
    for (const auto& answer : cluster.Attend(QueryOf(p))) {
      ASSERT_TRUE(answer.ok());
      bytes += answer->bytes_read;
    }
    if (ranks == 1) one = bytes;
    EXPECT_GT(bytes, 0);
    EXPECT_EQ(bytes, one);
  }
}

// A backend whose steps fail or lie at a chosen call.
class FaultyStep : public AttentionStep {
 public:
  using Change = std::function<absl::Status(absl::Span<int64_t>)>;
  FaultyStep(std::unique_ptr<AttentionStep> step, Change sums)
      : step_(std::move(step)), sums_(std::move(sums)) {}
  absl::Status Attend() override { return step_->Attend(); }
  absl::Status SinkSums(absl::Span<int64_t> words) override {
    if (absl::Status status = step_->SinkSums(words); !status.ok()) return status;
    return sums_(words);
  }
  absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() override { return step_->SelectForMaximum(); }
  absl::Status TakeSelection(absl::Span<const int64_t> row_heads) override {
    return step_->TakeSelection(row_heads);
  }
  absl::Status Maxima(absl::Span<float> maxima) override { return step_->Maxima(maxima); }
  absl::Status MaximumSums(absl::Span<int64_t> words) override { return step_->MaximumSums(words); }
  absl::Status Finish(float* outputs, float* lse, float* sink_mass) override {
    return step_->Finish(outputs, lse, sink_mass);
  }
  PathCounts paths() const override { return step_->paths(); }
  int64_t bytes_read() const override { return step_->bytes_read(); }

 private:
  std::unique_ptr<AttentionStep> step_;
  Change sums_;
};

class FaultyBackend final : public testing::ForwardingBackend {
 public:
  FaultyBackend(Backend& own, FaultyStep::Change sums) : ForwardingBackend(&own), sums_(std::move(sums)) {}

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    auto step = ForwardingBackend::StartStep(args);
    if (!step.ok()) return step.status();
    return std::make_unique<FaultyStep>(*std::move(step), sums_);
  }

 private:
  FaultyStep::Change sums_;
};

Problem SinkProblem() {
  Problem p = MakeProblem(11);
  p.spec.sink_tokens = std::min<int64_t>(3, p.length);
  p.spec.sink_logits.clear();
  p.policy = Policy::kGlobal;
  return p;
}

TEST(ShardedAttention, AFailureOnOneRankReachesAllInsteadOfHangingThem) {
  const Problem p = SinkProblem();
  std::mt19937_64 random(1);
  Cluster cluster(p, 3, 1, random);
  std::unique_ptr<FaultyBackend> faulty;
  cluster.wrap = [&](int rank, Backend& own) -> Backend* {
    if (rank != 1) return &own;
    faulty = std::make_unique<FaultyBackend>(
        own, [](absl::Span<int64_t>) { return absl::DataLossError("broken device"); });
    return faulty.get();
  };
  const auto answers = cluster.Attend(QueryOf(p));
  EXPECT_EQ(answers[1].status().code(), absl::StatusCode::kDataLoss);
  for (const int rank : {0, 2}) {
    EXPECT_TRUE(absl::IsUnavailable(answers[rank].status()) || absl::IsAborted(answers[rank].status()))
        << answers[rank].status();
  }
}

TEST(ShardedAttention, NonFiniteArithmeticIsAnErrorOnEveryRank) {
  Problem p = SinkProblem();
  p.spec.shape.key_dtype = p.spec.shape.value_dtype = DType::kF32;
  p.spec.shape.softcap = 0;
  p.length = 700;
  std::mt19937_64 random(2);
  const AttentionShape& shape = p.spec.shape;
  p.keys.assign(p.spec.layers * p.length * shape.kv_heads * shape.head_dim, 0.5f);
  p.values.assign(p.spec.layers * p.length * shape.kv_heads * shape.value_dim, 0.5f);
  std::fill(p.positions.begin(), p.positions.end(), p.length - 1);
  // One key of page 1, finite, whose product with a query is beyond f32.
  for (int layer = 0; layer < p.spec.layers; ++layer) {
    p.keys[(layer * p.length + 300) * shape.kv_heads * shape.head_dim] = 3e38f;
  }
  std::fill(p.queries.begin(), p.queries.end(), 1e30f);
  p.spec.shape.scale = 1;
  Cluster cluster(p, 3, 1, random);
  for (const auto& answer : cluster.Attend(QueryOf(p))) {
    EXPECT_EQ(answer.status().code(), absl::StatusCode::kInvalidArgument) << answer.status();
  }
}

// The step of AttendSharded for the problem's query on one rank.
struct RankStep {
  RankStep(const Problem& p, const Sequence& sequence) {
    for (const int64_t position : p.positions) {
      const Visibility v = VisibleTo({p.policy, p.spec.sink_tokens, p.spec.window}, position, p.length);
      visible.push_back(v.keys);
      visible_sinks.push_back(v.sinks);
    }
    args.shape = p.spec.shape;
    args.rows = p.rows;
    args.queries = p.queries.data();
    args.visible = visible;
    args.pages = sequence.pages(p.layer).refs();
    lists = OwnedPageLists(static_cast<int64_t>(args.pages.size()), p.rows);
    args.lists = lists.view();
    args.sink_pages = sequence.sink_pages(p.layer).refs();
    args.visible_sinks = visible_sinks;
    args.sink_logits = sequence.spec().sink_logits;
    args.exponents = sequence.exponents(p.layer, p.length);
    args.positions = p.length;
  }
  RankStep(const RankStep&) = delete;

  std::vector<PositionRange> visible;
  std::vector<int32_t> visible_sinks;
  OwnedPageLists lists;
  StepArgs args;
};

// Until there are `row_heads` at least, of queries of other sizes, so that they take other paths.
void AddRows(Problem& p, int row_heads) {
  std::mt19937_64 random(p.seed);
  const int64_t query_row = int64_t{p.spec.shape.query_heads} * p.spec.shape.head_dim;
  const float sizes[] = {0.02F, 0.3F, 1};
  while (p.rows * p.spec.shape.query_heads < row_heads) {
    const auto from = static_cast<int64_t>(random() % p.rows);
    const float size = sizes[random() % 3];
    for (int64_t i = 0; i < query_row; ++i) p.queries.push_back(size * p.queries[from * query_row + i]);
    p.positions.push_back(p.positions[from]);
    ++p.rows;
  }
}

// Steps of different sequences, shapes and paths, with sinks and without. One has more rows and heads than
// there are bits in a word.
TEST(ShardedAttention, StepsInOneMessageGetTheBytesThatTheyGetAlone) {
  int with_maximum = 0;
  int without_maximum = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    std::vector<Problem> problems;
    for (uint64_t i = 0; i < 4; ++i) {
      problems.push_back(MakeProblem(1000 + 4 * seed + i));
      problems.back().cpu = true;  // Their pages are read by one backend.
      if (i == 1) AddRows(problems.back(), 65);
      if (seed == 5) {
        problems.back().spec.sink_logits.clear();
        problems.back().spec.sink_tokens = 0;
      }
      if (seed % 3 != 0) continue;
      // Sinks about as heavy as the keys: these stay on the sink path.
      problems.back().spec.sink_logits.assign(problems.back().spec.shape.query_heads, 3.0F);
      problems.back().spec.shape.scale /= problems.back().logit_size;
      problems.back().spec.sink_tokens = 0;
    }
    // The last one's arithmetic overflows.
    problems.push_back(problems[seed % 4]);
    Problem& harmed = problems.back();
    harmed.spec.sink_tokens = 0;
    harmed.spec.shape.softcap = 0;
    harmed.spec.shape.scale = 1e3F;
    std::fill(harmed.queries.begin(), harmed.queries.end(), 3e38F);

    for (const int ranks : {1, 2, 3, 4}) {
      SCOPED_TRACE(absl::StrCat("seed=", seed, " ranks=", ranks));
      std::mt19937_64 random(seed);
      std::vector<std::unique_ptr<Cluster>> clusters;
      std::vector<AttentionAnswer> alone;
      for (const Problem& p : problems) {
        clusters.push_back(std::make_unique<Cluster>(p, ranks, 1, random));
        const auto answers = clusters.back()->Attend(QueryOf(p));
        if (&p == &harmed) {
          EXPECT_EQ(answers[0].status().code(), absl::StatusCode::kInvalidArgument);
          continue;
        }
        ASSERT_TRUE(answers[0].ok()) << p.Text() << answers[0].status();
        alone.push_back(*answers[0]);
      }
      const bool any_sinks = std::any_of(problems.begin(), problems.end() - 1, [](const Problem& p) {
        return p.spec.sink_tokens > 0 || !p.spec.sink_logits.empty();
      });
      const bool any_maximum = std::any_of(alone.begin(), alone.end(), [](const AttentionAnswer& answer) {
        return std::any_of(answer.row_heads_maximum.begin(), answer.row_heads_maximum.end(),
                           [](int32_t heads) { return heads > 0; });
      });
      ++(any_maximum ? with_maximum : without_maximum);

      for (const bool gloo : {false, true}) {
        SCOPED_TRACE(gloo ? "gloo" : "local");
        LocalHub hub;
        MapRendezvous store;
        std::vector<std::thread> threads;
        threads.reserve(ranks);
        for (int rank = 0; rank < ranks; ++rank) {
          threads.emplace_back([&, rank] {
            const absl::Time deadline = absl::Now() + absl::Seconds(60);
            auto communicator =
                gloo ? ConnectGloo(rank, ranks, store, {}, deadline) : hub.Join(1, 1, rank, ranks, deadline);
            ASSERT_TRUE(communicator.ok()) << communicator.status();
            testing::CountingCommunicator counting(communicator->get());
            std::vector<std::unique_ptr<RankStep>> steps;
            std::vector<StepArgs> args;
            for (size_t i = 0; i < problems.size(); ++i) {
              steps.push_back(std::make_unique<RankStep>(problems[i], clusters[i]->sequence(rank)));
              args.push_back(steps.back()->args);
            }
            const auto all = AttendPages(clusters[0]->backend(rank), &counting, args, {}, deadline);
            EXPECT_EQ(all.status().code(), absl::StatusCode::kInvalidArgument) << all.status();
            // Nobody was left waiting, and the group goes on. Of a step that is one rank's, only that rank is
            // told.
            std::vector<int> owners;
            for (size_t i = 0; i < args.size(); ++i) {
              owners.push_back(static_cast<int>(i * ranks / args.size()));
            }
            const auto own = AttendPages(clusters[0]->backend(rank), &counting, args, owners, deadline);
            EXPECT_EQ(own.status().code(),
                      rank == owners.back() ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOk)
                << own.status();
            counting.TakeReductions();
            args.pop_back();
            const auto together = AttendPages(clusters[0]->backend(rank), &counting, args, {}, deadline);
            ASSERT_TRUE(together.ok()) << together.status();
            EXPECT_EQ(counting.TakeReductions(), (any_sinks ? 1 : 0) + (any_maximum ? 2 : 0));
            for (size_t i = 0; i < alone.size(); ++i) {
              const AttentionAnswer& answer = (*together)[i];
              EXPECT_TRUE(SameBits(answer.outputs, alone[i].outputs)) << problems[i].Text();
              EXPECT_TRUE(SameBits(answer.lse, alone[i].lse));
              EXPECT_TRUE(SameBits(answer.sink_mass, alone[i].sink_mass));
              EXPECT_EQ(answer.row_heads_maximum, alone[i].row_heads_maximum);
              EXPECT_EQ(answer.collectives, alone[i].collectives);
            }
            owners.pop_back();
            const auto mine = AttendPages(clusters[0]->backend(rank), &counting, args, owners, deadline);
            ASSERT_TRUE(mine.ok()) << mine.status();
            EXPECT_EQ(counting.TakeReductions(), (any_sinks ? 2 : 0) + (any_maximum ? 2 : 0));
            for (size_t i = 0; i < alone.size(); ++i) {
              const AttentionAnswer nothing;
              const AttentionAnswer& wanted = owners[i] == rank ? alone[i] : nothing;
              const AttentionAnswer& answer = (*mine)[i];
              EXPECT_TRUE(SameBits(answer.outputs, wanted.outputs)) << problems[i].Text();
              EXPECT_TRUE(SameBits(answer.lse, wanted.lse));
              EXPECT_TRUE(SameBits(answer.sink_mass, wanted.sink_mass));
              EXPECT_EQ(answer.row_heads_maximum, wanted.row_heads_maximum);
              EXPECT_EQ(answer.collectives, alone[i].collectives);
              EXPECT_EQ(answer.bytes_read, (*together)[i].bytes_read);
            }
          });
        }
        for (std::thread& thread : threads) thread.join();
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_GT(with_maximum, 0);
  EXPECT_GT(without_maximum, 0);
}

}  // namespace
}  // namespace eduba
