#include "attention/staged_append.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/dtype.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// Keys and values of all layers, [layers, positions, kv_heads, dim] f32.
struct Content {
  std::vector<float> keys;
  std::vector<float> values;
};

SequenceSpec SmallSpec() {
  SequenceSpec spec;
  spec.shape = {.query_heads = 2,
                .kv_heads = 2,
                .head_dim = 3,
                .value_dim = 2,
                .key_dtype = DType::kF32,
                .value_dtype = DType::kF32};
  spec.layers = 2;
  return spec;
}

Content RandomContent(const SequenceSpec& spec, int64_t positions, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Content content;
  content.keys.resize(spec.layers * positions * spec.shape.kv_heads * spec.shape.head_dim);
  content.values.resize(spec.layers * positions * spec.shape.kv_heads * spec.shape.value_dim);
  for (float& x : content.keys) x = normal(random);
  for (float& x : content.values) x = normal(random);
  return content;
}

absl::Span<const char> Bytes(const float* data, int64_t count) {
  return {reinterpret_cast<const char*>(data), static_cast<size_t>(count) * sizeof(float)};
}

class StagedAppendTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<StagedAppend>> Begin(Sequence& sequence, int64_t at, int64_t count,
                                                      std::vector<PositionRange> owned,
                                                      bool compare_only = false) {
    return StagedAppend::Begin(
        backend_.get(), &store_, &sequence,
        {.at = at, .count = count, .owned = std::move(owned), .compare_only = compare_only});
  }

  // Sends positions `range` of one layer out of `content`, which holds `positions` positions.
  static absl::Status Send(StagedAppend& append, const Content& content, int64_t positions, int layer,
                           PositionRange range) {
    const AttentionShape& shape = append.sequence().spec().shape;
    const int64_t key_row = int64_t{shape.kv_heads} * shape.head_dim;
    const int64_t value_row = int64_t{shape.kv_heads} * shape.value_dim;
    const int64_t row = layer * positions + range.begin;
    return append.AddRows(layer, range.begin, range.size(), DType::kF32,
                          Bytes(content.keys.data() + row * key_row, range.size() * key_row),
                          Bytes(content.values.data() + row * value_row, range.size() * value_row));
  }

  // A whole append to a sequence whose worker owns everything.
  AppendSeal Append(Sequence& sequence, const Content& content, int64_t positions, PositionRange range) {
    auto append = Begin(sequence, range.begin, range.size(), {range});
    EXPECT_TRUE(append.ok()) << append.status();
    for (int layer = 0; layer < sequence.spec().layers; ++layer) {
      EXPECT_EQ(Send(**append, content, positions, layer, range), absl::OkStatus());
    }
    auto seal = (*append)->Seal();
    EXPECT_TRUE(seal.ok()) << seal.status();
    EXPECT_EQ((*append)->Publish(seal->exponents), absl::OkStatus());
    return *seal;
  }

  // All rows that a query could read.
  std::string Stored(const Sequence& sequence) const {
    const SequenceSpec& spec = sequence.spec();
    const size_t element = DTypeBytes(spec.shape.key_dtype);
    const size_t key_row = element * spec.shape.kv_heads * spec.shape.head_dim;
    const size_t value_row = element * spec.shape.kv_heads * spec.shape.value_dim;
    std::string all;
    const auto add = [&](const PageTable& table, int64_t end) {
      for (const PageRef& page : table.refs()) {
        const size_t rows = std::min<int64_t>(kPageRows, end - PageBegin(page.index));
        absl::StrAppend(&all, "|", page.index, ":");
        std::string keys(rows * key_row, 0);
        std::string values(rows * value_row, 0);
        EXPECT_TRUE(
            backend_->ReadRows(spec.shape, page.data, 0, static_cast<int>(rows), keys.data(), values.data())
                .ok());
        all.append(keys).append(values);
      }
    };
    for (int layer = 0; layer < spec.layers; ++layer) {
      add(sequence.pages(layer), sequence.length());
      add(sequence.sink_pages(layer), std::min(sequence.length(), spec.sink_tokens));
    }
    return all;
  }

  std::unique_ptr<Backend> backend_ = MakeReferenceBackend();
  PageStore store_{backend_.get(), int64_t{64} << 20};
};

TEST_F(StagedAppendTest, AnyChunkingGivesTheSamePagesDigestAndExponents) {
  SequenceSpec spec = SmallSpec();
  spec.sink_tokens = 5;
  constexpr int64_t kPositions = 700;
  const Content content = RandomContent(spec, kPositions, 1);
  Sequence whole(spec);
  const AppendSeal one = Append(whole, content, kPositions, {0, kPositions});

  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    Sequence parts(spec);
    Digest digest;
    for (int64_t at = 0; at < kPositions;) {
      const int64_t n = std::min<int64_t>(kPositions - at, 1 + static_cast<int64_t>(random() % 400));
      auto append = Begin(parts, at, n, {{at, at + n}});
      ASSERT_TRUE(append.ok()) << append.status();
      // Pieces of all layers in random order, from two threads.
      std::vector<std::pair<int, PositionRange>> pieces;
      for (int layer = 0; layer < spec.layers; ++layer) {
        for (int64_t first = at; first < at + n;) {
          const int64_t count = std::min<int64_t>(at + n - first, 1 + static_cast<int64_t>(random() % 90));
          pieces.emplace_back(layer, PositionRange{first, first + count});
          first += count;
        }
      }
      std::shuffle(pieces.begin(), pieces.end(), random);
      std::vector<std::thread> threads;
      threads.reserve(2);
      for (size_t t = 0; t < 2; ++t) {
        threads.emplace_back([&, t] {
          for (size_t i = t; i < pieces.size(); i += 2) {
            EXPECT_EQ(Send(**append, content, kPositions, pieces[i].first, pieces[i].second),
                      absl::OkStatus());
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
      auto seal = (*append)->Seal();
      ASSERT_TRUE(seal.ok()) << seal.status();
      digest += seal->digest;
      ASSERT_EQ((*append)->Publish(seal->exponents), absl::OkStatus());
      at += n;
    }
    EXPECT_EQ(digest, one.digest);
    EXPECT_EQ(parts.digest(), one.digest);
    EXPECT_EQ(parts.owned_exponents(), whole.owned_exponents());
    EXPECT_EQ(parts.length(), kPositions);
    EXPECT_TRUE(Stored(parts) == Stored(whole));
  }
}

TEST_F(StagedAppendTest, SharesOfTheDigestAddUpForAnyPlacement) {
  SequenceSpec spec = SmallSpec();
  spec.sink_tokens = 300;
  constexpr int64_t kPositions = 1000;
  const Content content = RandomContent(spec, kPositions, 2);
  Sequence whole(spec);
  const AppendSeal one = Append(whole, content, kPositions, {0, kPositions});

  // Worker 0: pages 0 and 2; worker 1: pages 1 and 3. Both take the sinks.
  const std::vector<std::vector<PositionRange>> owned = {{{0, 256}, {512, 768}}, {{256, 512}, {768, 1000}}};
  Digest digest;
  std::vector<int16_t> exponents(spec.exponents(), kNoExponent);
  for (int worker = 0; worker < 2; ++worker) {
    Sequence sequence(spec);
    auto append = Begin(sequence, 0, kPositions, owned[worker]);
    ASSERT_TRUE(append.ok());
    for (int layer = 0; layer < spec.layers; ++layer) {
      // A run of what is owned or sink.
      const std::vector<PositionRange> runs = worker == 0 ? std::vector<PositionRange>{{0, 300}, {512, 768}}
                                                          : std::vector<PositionRange>{{0, 512}, {768, 1000}};
      for (const PositionRange& run : runs) {
        ASSERT_EQ(Send(**append, content, kPositions, layer, run), absl::OkStatus());
      }
    }
    auto seal = (*append)->Seal();
    ASSERT_TRUE(seal.ok()) << seal.status();
    digest += seal->digest;
    for (size_t i = 0; i < exponents.size(); ++i) exponents[i] = std::max(exponents[i], seal->exponents[i]);
    ASSERT_EQ((*append)->Publish(seal->exponents), absl::OkStatus());
    EXPECT_EQ(sequence.pages(1).refs().size(), 2u);
    EXPECT_EQ(sequence.sink_pages(1).refs().size(), 2u);
    EXPECT_EQ(sequence.sink_pages(1).refs()[1].index, 1);
  }
  EXPECT_EQ(digest, one.digest);
  EXPECT_EQ(exponents, one.exponents);
}

TEST_F(StagedAppendTest, QueriesSeeNothingOfAnAppendUntilItIsPublished) {
  const SequenceSpec spec = SmallSpec();
  const Content content = RandomContent(spec, 400, 3);
  Sequence sequence(spec);
  Append(sequence, content, 400, {0, 100});
  const std::string before = Stored(sequence);
  {
    auto append = Begin(sequence, 100, 300, {{100, 400}});
    ASSERT_TRUE(append.ok());
    ASSERT_EQ(Send(**append, content, 400, 0, {100, 400}), absl::OkStatus());
    EXPECT_TRUE(Stored(sequence) == before);
    (*append)->Abort();
    EXPECT_EQ(Send(**append, content, 400, 1, {100, 400}).code(), absl::StatusCode::kAborted);
  }
  EXPECT_TRUE(Stored(sequence) == before);
  EXPECT_EQ(store_.used_bytes(), 2 * backend_->PageBytes(spec.shape));
}

TEST_F(StagedAppendTest, ACommittedTailPageStaysWhereAReaderHoldsIt) {
  const SequenceSpec spec = SmallSpec();
  const Content content = RandomContent(spec, 400, 4);
  Sequence sequence(spec);
  Append(sequence, content, 400, {0, 100});
  const void* const tail = sequence.pages(0).refs()[0].data;
  auto append = Begin(sequence, 100, 1, {{100, 101}});
  ASSERT_TRUE(append.ok());
  for (int layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(Send(**append, content, 400, layer, {100, 101}), absl::OkStatus());
  }
  EXPECT_EQ(sequence.pages(0).refs()[0].data, tail);
  ASSERT_EQ((*append)->Publish((*append)->Seal()->exponents), absl::OkStatus());
  EXPECT_NE(sequence.pages(0).refs()[0].data, tail);
}

TEST_F(StagedAppendTest, TheSealNamesTheFirstMissingPosition) {
  SequenceSpec spec = SmallSpec();
  spec.sink_tokens = 2;
  const Content content = RandomContent(spec, 600, 5);
  Sequence sequence(spec);
  auto append = Begin(sequence, 0, 600, {{256, 600}});  // page 0 is another worker's
  ASSERT_TRUE(append.ok());
  const auto missing = [&] { return std::string((*append)->Seal().status().message()); };
  EXPECT_THAT(missing(), StartsWith("position 0 of layer 0 "));
  ASSERT_EQ(Send(**append, content, 600, 0, {0, 2}), absl::OkStatus());
  EXPECT_THAT(missing(), StartsWith("position 256 of layer 0 "));
  ASSERT_EQ(Send(**append, content, 600, 0, {256, 500}), absl::OkStatus());
  EXPECT_THAT(missing(), StartsWith("position 500 of layer 0 "));
  ASSERT_EQ(Send(**append, content, 600, 0, {500, 600}), absl::OkStatus());
  EXPECT_THAT(missing(), StartsWith("position 0 of layer 1 "));
  ASSERT_EQ(Send(**append, content, 600, 1, {256, 600}), absl::OkStatus());
  EXPECT_EQ((*append)->Seal().status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_EQ(Send(**append, content, 600, 1, {0, 2}), absl::OkStatus());
  EXPECT_TRUE((*append)->Seal().ok());
  EXPECT_EQ(Send(**append, content, 600, 1, {0, 2}).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StagedAppendTest, AMistakeEndsTheAppendAndIsRepeatedAtTheSeal) {
  const SequenceSpec spec = SmallSpec();
  const Content content = RandomContent(spec, 600, 6);
  Sequence sequence(spec);
  struct Mistake {
    const char* name;
    std::function<absl::Status(StagedAppend&)> make;
    const char* says;
  };
  const std::string keys(10 * 6 * 4, 'x');
  const std::string values(10 * 4 * 4, 'x');
  const Mistake mistakes[] = {
      {"twice",
       [&](StagedAppend& a) {
         EXPECT_EQ(Send(a, content, 600, 1, {300, 400}), absl::OkStatus());
         return Send(a, content, 600, 1, {399, 420});
       },
       "position 399 of layer 1 was sent twice"},
      {"not owned",
       [&](StagedAppend& a) {
         return Send(a, content, 600, 0, {10, 20});
       },
       "position 10 is not this worker's"},
      {"beyond the end of what is owned",
       [&](StagedAppend& a) {
         return Send(a, content, 600, 0, {500, 600});
       },
       "position 512 is not this worker's"},
      {"layer", [&](StagedAppend& a) { return a.AddRows(2, 256, 10, DType::kF32, keys, values); },
       "layer is 2, wanted 0 to 1"},
      {"no positions", [&](StagedAppend& a) { return a.AddRows(0, 256, 0, DType::kF32, "", ""); },
       "piece has 0 positions"},
      {"a huge count",
       [&](StagedAppend& a) { return a.AddRows(0, 256, INT64_MAX, DType::kF32, keys, values); }, "piece has"},
      {"short keys", [&](StagedAppend& a) { return a.AddRows(0, 256, 11, DType::kF32, keys, values); },
       "keys of 11 positions have 240 bytes, wanted 264 ([11, 2, 3] f32)"},
      {"long values", [&](StagedAppend& a) { return a.AddRows(0, 256, 10, DType::kF32, keys, keys); },
       "values of 10 positions have 240 bytes, wanted 160"},
  };
  for (const Mistake& mistake : mistakes) {
    SCOPED_TRACE(mistake.name);
    auto append = Begin(sequence, 0, 600, {{256, 512}});
    ASSERT_TRUE(append.ok()) << append.status();
    const absl::Status status = mistake.make(**append);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(mistake.says));
    EXPECT_EQ((*append)->Seal().status(), status);
    EXPECT_EQ(Send(**append, content, 600, 0, {256, 260}), status);
    append->reset();
    EXPECT_EQ(store_.used_bytes(), 0);
  }
}

TEST_F(StagedAppendTest, NonFiniteNumbersAreRefusedWithTheirPlace) {
  SequenceSpec spec = SmallSpec();
  spec.shape.key_dtype = spec.shape.value_dtype = DType::kF16;
  Sequence sequence(spec);
  struct Case {
    float value;
    bool in_keys;
    const char* says;
  };
  const Case cases[] = {
      {std::numeric_limits<float>::quiet_NaN(), true,
       "keys at position 103, layer 1, KV head 1, channel 1: found NaN"},
      {-std::numeric_limits<float>::infinity(), false,
       "values at position 104, layer 1, KV head 1, channel 1: found Inf"},
      {70000.0f, true,
       "keys at position 103, layer 1, KV head 1, channel 1: 70000 is beyond the range of f16"},
  };
  for (const Case& c : cases) {
    auto append = Begin(sequence, 0, 200, {{0, 200}});
    ASSERT_TRUE(append.ok());
    Content content = RandomContent(spec, 10, 7);
    // Row 3 of the keys (6 elements a row), row 4 of the values (4 a row): the last KV head.
    (c.in_keys ? content.keys[3 * 6 + 4] : content.values[4 * 4 + 3]) = c.value;
    const absl::Status status = (*append)->AddRows(1, 100, 10, DType::kF32, Bytes(content.keys.data(), 60),
                                                   Bytes(content.values.data(), 40));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
  }
}

TEST_F(StagedAppendTest, ARetryIsDigestedAndStoresNothing) {
  SequenceSpec spec = SmallSpec();
  spec.sink_tokens = 3;
  Content content = RandomContent(spec, 300, 8);
  Sequence sequence(spec);
  const AppendSeal original = Append(sequence, content, 300, {0, 300});
  const std::string before = Stored(sequence);
  const int64_t used = store_.used_bytes();
  for (const bool changed : {false, true}) {
    if (changed) content.values[2 * 300 * 2 - 1] += 1;
    auto append = Begin(sequence, 0, 300, {{0, 300}}, /*compare_only=*/true);
    ASSERT_TRUE(append.ok()) << append.status();
    EXPECT_EQ(store_.used_bytes(), used);
    for (int layer = 0; layer < 2; ++layer) {
      ASSERT_EQ(Send(**append, content, 300, layer, {0, 300}), absl::OkStatus());
    }
    auto seal = (*append)->Seal();
    ASSERT_TRUE(seal.ok());
    EXPECT_EQ(seal->digest == original.digest, !changed);
    EXPECT_EQ((*append)->Publish(seal->exponents), absl::OkStatus());
    EXPECT_TRUE(Stored(sequence) == before);
    EXPECT_EQ(sequence.length(), 300);
  }
}

TEST_F(StagedAppendTest, AppendsThatDoNotFitReserveNothing) {
  const SequenceSpec spec = SmallSpec();
  PageStore small(backend_.get(), 5 * backend_->PageBytes(spec.shape));
  Sequence sequence(spec);
  const auto begin = [&](int64_t count) {
    return StagedAppend::Begin(backend_.get(), &small, &sequence,
                               {.at = 0, .count = count, .owned = {{0, count}}, .compare_only = false});
  };
  EXPECT_EQ(begin(600).status().code(), absl::StatusCode::kResourceExhausted);  // 3 pages of 2 layers
  EXPECT_EQ(begin(kMaxPositions).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(small.used_bytes(), 0);
  EXPECT_TRUE(begin(512).ok());
}

TEST_F(StagedAppendTest, OffsetsAndSharesAreChecked) {
  const SequenceSpec spec = SmallSpec();
  const Content content = RandomContent(spec, 300, 9);
  Sequence sequence(spec);
  Append(sequence, content, 300, {0, 300});
  const auto code = [&](int64_t at, int64_t count, std::vector<PositionRange> owned,
                        bool compare_only = false) {
    return Begin(sequence, at, count, std::move(owned), compare_only).status().code();
  };
  EXPECT_EQ(code(301, 10, {{301, 311}}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(299, 10, {{299, 309}}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(299, 2, {{299, 301}}, /*compare_only=*/true), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(299, 1, {{299, 300}}, /*compare_only=*/true), absl::StatusCode::kOk);
  EXPECT_EQ(code(300, 0, {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(300, kMaxPositions, {}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(300, 300, {{300, 500}}), absl::StatusCode::kInvalidArgument);  // cuts page 1
  EXPECT_EQ(code(300, 300, {{512, 600}, {300, 512}}), absl::StatusCode::kOk);
  EXPECT_EQ(code(300, 300, {{512, 600}, {300, 600}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(300, 300, {{512, 601}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(300, 300, {{300, 600}}), absl::StatusCode::kOk);
  EXPECT_EQ(code(300, 300, {}), absl::StatusCode::kOk);
  // The tail page must be where its earlier rows are.
  Sequence empty_handed(spec);
  auto first = Begin(empty_handed, 0, 300, {});
  ASSERT_TRUE(first.ok());
  ASSERT_EQ((*first)->Publish((*first)->Seal()->exponents), absl::OkStatus());
  EXPECT_EQ(Begin(empty_handed, 300, 10, {{300, 310}}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace eduba
