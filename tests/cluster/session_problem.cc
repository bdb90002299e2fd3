#include "tests/cluster/session_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/testing/same_bits.h"
#include "gtest/gtest.h"
#include "kernels/reference/attention.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// Rows [at, ...) of a content.
class ContentSource : public RowSource {
 public:
  ContentSource(const Content& content, int64_t at) : content_(content), at_(at) {}
  DType dtype() const override { return DType::kF32; }
  absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const override {
    const int64_t row = layer * content_.length + at_ + first;
    std::memcpy(keys, content_.keys.data() + row * content_.key_row(),
                count * content_.key_row() * sizeof(float));
    std::memcpy(values, content_.values.data() + row * content_.value_row(),
                count * content_.value_row() * sizeof(float));
    return absl::OkStatus();
  }

 private:
  const Content& content_;
  const int64_t at_;
};

}  // namespace

bool Answers::operator==(const Answers& other) const {
  return SameBits(outputs, other.outputs) && SameBits(lse, other.lse) &&
         SameBits(sink_mass, other.sink_mass) && summary.row_heads_sink() == other.summary.row_heads_sink() &&
         summary.row_heads_maximum() == other.summary.row_heads_maximum();
}

std::string Problem::Text() const {
  std::string spec = content.spec.ShortDebugString();
  return absl::StrCat("seed=", seed, " {length=", content.length, " ", spec, "}");
}

Content MakeContent(const v1::SessionSpec& given, int64_t length, Random& random) {
  Content content;
  content.spec = *CompleteSpec(given);
  content.length = length;
  content.keys.resize(content.spec.layers() * length * content.key_row());
  content.values.resize(content.spec.layers() * length * content.value_row());
  std::normal_distribution<float> normal;
  for (float& x : content.keys) x = normal(random);
  // Values that grow along the sequence, so that later appends raise the exponents.
  for (size_t i = 0; i < content.values.size(); ++i) {
    content.values[i] = normal(random) * (1.0f + static_cast<float>(i % 4096) / 512.0f);
  }
  return content;
}

Call MakeCall(const Content& content, Random& random) {
  const v1::SessionSpec& spec = content.spec;
  Call call;
  call.options.layer = static_cast<int>(Below(random, spec.layers()));
  call.options.policy = spec.window() > 0 && Below(random, 2) == 0 ? v1::POLICY_WINDOW : v1::POLICY_GLOBAL;
  call.options.positions = Below(random, 2) == 0;
  call.rows = 1 + Below(random, Below(random, 4) == 0 ? 600 : 12);
  std::normal_distribution<float> normal;
  call.queries.resize(call.rows * spec.query_heads() * spec.head_dim());
  for (float& x : call.queries) x = normal(random);
  call.positions.reserve(call.rows);
  for (int64_t r = 0; r < call.rows; ++r) call.positions.push_back(Below(random, content.length));
  return call;
}

Problem MakeProblem(uint64_t seed) {
  Random random(seed);
  v1::SessionSpec spec;
  spec.set_layers(static_cast<int>(1 + Below(random, 2)));
  spec.set_kv_heads(static_cast<int>(1 + Below(random, 2)));
  spec.set_query_heads(spec.kv_heads() * static_cast<int>(1 + Below(random, 3)));
  spec.set_head_dim(static_cast<int>(1 + Below(random, 20)));
  spec.set_value_dim(static_cast<int>(1 + Below(random, 20)));
  spec.set_dtype(static_cast<v1::DType>(1 + Below(random, 3)));
  spec.set_sink_tokens(Below(random, 2) == 0 ? 0 : Below(random, 300));
  for (int h = 0; Below(random, 2) == 0 && h < spec.query_heads(); ++h) {
    while (spec.sink_logits_size() < spec.query_heads()) {
      spec.add_sink_logits(static_cast<float>(Below(random, 9)) - 2.0f);
    }
  }
  spec.set_window(Below(random, 3) == 0 ? 0 : 1 + Below(random, 700));
  spec.set_softcap(Below(random, 4) == 0 ? 8.0f : 0.0f);
  const float scales[] = {0.3f, 1.0f, 3.0f};
  spec.set_scale(scales[Below(random, 3)] / std::sqrt(static_cast<float>(spec.head_dim())));

  Problem problem;
  problem.seed = seed;
  problem.content = MakeContent(spec, 1 + Below(random, 4000), random);
  const int64_t calls = 3 + Below(random, 5);
  problem.calls.reserve(calls);
  for (int64_t i = 0; i < calls; ++i) problem.calls.push_back(MakeCall(problem.content, random));
  return problem;
}

absl::StatusOr<v1::AppendReceipt> Append(Client& client, const v1::Session& session, const Content& content,
                                         int64_t at, int64_t count, bool thin, bool say_at) {
  AppendOptions options;
  if (say_at) options.at = at;
  const ContentSource source(content, at);
  return thin ? client.AppendProxied(session, count, source, options)
              : client.Append(session, count, source, options);
}

absl::StatusOr<Answers> Ask(Client& client, const v1::Session& session, const Call& call) {
  const int64_t query_row = int64_t{session.spec().query_heads()} * session.spec().head_dim();
  Answers answers;
  const auto queries = [&](int64_t first, absl::Span<float> rows, absl::Span<int64_t> positions) {
    std::copy_n(call.queries.begin() + first * query_row, rows.size(), rows.begin());
    std::copy_n(call.positions.begin() + first, positions.size(), positions.begin());
    return absl::OkStatus();
  };
  const auto take = [&](const AnsweredRows& rows) {
    answers.outputs.insert(answers.outputs.end(), rows.outputs.begin(), rows.outputs.end());
    answers.lse.insert(answers.lse.end(), rows.lse.begin(), rows.lse.end());
    answers.sink_mass.insert(answers.sink_mass.end(), rows.sink_mass.begin(), rows.sink_mass.end());
    return absl::OkStatus();
  };
  auto summary = client.Attend(session, call.rows, queries, take, call.options);
  if (!summary.ok()) return summary.status();
  answers.summary = *std::move(summary);
  return answers;
}

absl::StatusOr<v1::Session> StoreSession(Client& client, const std::string& name, const Content& content) {
  auto session = client.CreateSession(name, content.spec);
  if (!session.ok()) return session.status();
  const auto receipt = Append(client, *session, content, 0, content.length, /*thin=*/false, /*say_at=*/false);
  if (!receipt.ok()) return receipt.status();
  return session;
}

void ExpectOracle(const Content& content, const Call& call, const Answers& answers) {
  const v1::SessionSpec& spec = content.spec;
  const DType dtype = *DTypeFromProto(spec.dtype());
  const auto stored = [&](const std::vector<float>& rows, int64_t row) {
    std::vector<float> layer(rows.begin() + call.options.layer * content.length * row,
                             rows.begin() + (call.options.layer + 1) * content.length * row);
    for (float& x : layer) {
      uint32_t element = 0;
      StoreElement(&element, dtype, 0, x);
      x = LoadElement(&element, dtype, 0);
    }
    return layer;
  };
  DenseAttention dense;
  dense.rows = static_cast<int>(std::min<int64_t>(call.rows, 16));
  dense.query_heads = spec.query_heads();
  dense.kv_heads = spec.kv_heads();
  dense.head_dim = spec.head_dim();
  dense.value_dim = spec.value_dim();
  dense.scale = spec.scale();
  dense.softcap = spec.softcap();
  dense.queries.assign(call.queries.begin(),
                       call.queries.begin() + int64_t{dense.rows} * spec.query_heads() * spec.head_dim());
  dense.keys = stored(content.keys, content.key_row());
  dense.values = stored(content.values, content.value_row());
  dense.sink_logits.assign(spec.sink_logits().begin(), spec.sink_logits().end());
  dense.sink_tokens = static_cast<int>(spec.sink_tokens());
  dense.sees = [&](int row, int64_t j) {
    const int64_t p = call.options.positions ? call.positions[row] : content.length - 1;
    return j <= p &&
           (call.options.policy == v1::POLICY_GLOBAL || j < spec.sink_tokens() || p - spec.window() < j);
  };
  const DenseResult oracle = ReferenceAttention(dense);
  float size = 0;
  for (const float v : content.values) size = std::max(size, std::abs(v));
  for (size_t i = 0; i < oracle.outputs.size(); ++i) {
    ASSERT_NEAR(answers.outputs[i], oracle.outputs[i], 5e-6 * size) << "output " << i;
  }
  for (size_t i = 0; i < oracle.lse.size(); ++i) {
    ASSERT_NEAR(answers.lse[i], oracle.lse[i], 1e-5 * (1 + std::abs(oracle.lse[i]))) << "row and head " << i;
    ASSERT_NEAR(answers.sink_mass[i], oracle.sink_mass[i], 5e-6) << "row and head " << i;
  }
}

}  // namespace eduba
