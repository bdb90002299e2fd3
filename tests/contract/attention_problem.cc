#include "tests/contract/attention_problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/testing/same_bits.h"

namespace eduba {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float Round(float value, DType dtype) {
  char bytes[4];
  StoreElement(bytes, dtype, 0, value);
  return LoadElement(bytes, dtype, 0);
}

std::vector<char> Stored(const std::vector<float>& values, DType dtype) {
  std::vector<char> bytes(values.size() * DTypeBytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    StoreElement(bytes.data(), dtype, static_cast<int64_t>(i), values[i]);
  }
  return bytes;
}

// Which fp32 number system a channel's values live in; see ProblemSpec::Values.
float ChannelSize(ProblemSpec::Values values, DType dtype, int channel) {
  if (values == ProblemSpec::Values::kNormal) return 1;
  const bool narrow = dtype == DType::kF16;
  switch (channel % 4) {
    case 0:
      return 1;
    case 1:
      return narrow ? 1e-3F : 1e-20F;
    case 2:
      return narrow ? 1e4F : 1e20F;
    default:
      return 0;
  }
}

}  // namespace

std::string ProblemSpec::ToString() const {
  return absl::StrCat(
      "{seed=", seed, " heads=", shape.query_heads, "/", shape.kv_heads, " head_dim=", shape.head_dim,
      " value_dim=", shape.value_dim, " dtype=", DTypeName(shape.key_dtype), "/",
      DTypeName(shape.value_dtype), " scale=", shape.scale, " softcap=", shape.softcap, " rows=", rows,
      " positions=", positions, " sink_tokens=", sink_tokens,
      " sink_logit=", sink_logit ? absl::StrCat(*sink_logit) : "none", " logit_size=", logit_size,
      " sink_pull=", sink_pull, " values=", static_cast<int>(values), " visible=", static_cast<int>(visible),
      " partly_visible_sinks=", partly_visible_sinks, "}");
}

Problem::Problem(const ProblemSpec& problem_spec) : spec(problem_spec) {
  const AttentionShape& shape = spec.shape;
  std::mt19937_64 random(spec.seed);
  std::normal_distribution<float> normal;
  const auto index = [&](int64_t count) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(count));
  };

  queries.resize(static_cast<size_t>(spec.rows) * shape.query_heads * shape.head_dim);
  for (float& x : queries) x = normal(random);
  keys.resize(spec.positions * shape.kv_heads * shape.head_dim);
  for (float& x : keys) x = normal(random);
  // Token sinks along the first query's direction: they stand out for that query, above or below all keys.
  for (int64_t j = 0; j < std::min<int64_t>(spec.sink_tokens, spec.positions) && spec.sink_pull != 0; ++j) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      for (int d = 0; d < shape.head_dim; ++d) {
        keys[(j * shape.kv_heads + h) * shape.head_dim + d] +=
            spec.sink_pull * queries[static_cast<size_t>(h) * shape.gqa_group() * shape.head_dim + d];
      }
    }
  }
  float largest = 0;
  for (size_t i = 0; i < static_cast<size_t>(spec.rows) * shape.query_heads; ++i) {
    const float* query = &queries[i * shape.head_dim];
    const int64_t kv_head = static_cast<int64_t>(i) % shape.query_heads / shape.gqa_group();
    for (int64_t j = 0; j < spec.positions; ++j) {
      const float* key = &keys[(j * shape.kv_heads + kv_head) * shape.head_dim];
      largest = std::max(
          largest, std::abs(shape.scale * std::inner_product(query, query + shape.head_dim, key, 0.0F)));
    }
  }
  for (float& x : keys) x *= spec.logit_size / largest;
  for (float& x : keys) x = Round(x, shape.key_dtype);
  values.resize(spec.positions * shape.kv_heads * shape.value_dim);
  for (size_t i = 0; i < values.size(); ++i) {
    const int channel = static_cast<int>(i % shape.value_dim);
    values[i] =
        Round(normal(random) * ChannelSize(spec.values, shape.value_dtype, channel), shape.value_dtype);
  }

  const int64_t sinks = std::min<int64_t>(spec.sink_tokens, spec.positions);
  for (int row = 0; row < spec.rows; ++row) {
    PositionRange range{sinks, spec.positions};
    switch (spec.visible) {
      case ProblemSpec::Visible::kAll:
        break;
      case ProblemSpec::Visible::kCausal:
        range.end = spec.positions - std::min<int64_t>(spec.positions, (spec.rows - 1 - row) * 3);
        break;
      case ProblemSpec::Visible::kRandom: {
        const int64_t a = index(spec.positions + 1);
        const int64_t b = index(spec.positions + 1);
        range = {std::max(sinks, std::min(a, b)), std::max(a, b)};
        break;
      }
      case ProblemSpec::Visible::kWindow: {
        const int64_t end = 1 + index(spec.positions);
        range = {std::max(sinks, end - 1 - index(100)), end};
        break;
      }
      case ProblemSpec::Visible::kOneOrNone: {
        const int64_t at = index(spec.positions);
        range = {std::max(sinks, at), at + (row % 2)};
        break;
      }
    }
    visible.push_back(range);
    visible_sinks.push_back(
        static_cast<int32_t>(spec.partly_visible_sinks && sinks > 0 ? index(sinks + 1) : sinks));
  }
  if (spec.sink_logit) {
    for (int h = 0; h < shape.query_heads; ++h) {
      sink_logits.push_back(*spec.sink_logit + 0.125F * static_cast<float>(h));
    }
  }
  exponents.assign(static_cast<size_t>(shape.kv_heads) * shape.value_dim, -149);
  for (size_t i = 0; i < values.size(); ++i) {
    int16_t& exponent = exponents[i % exponents.size()];
    if (values[i] == 0) continue;
    int e = 0;
    if (std::frexp(std::abs(values[i]), &e) == 0.5F) --e;  // |v| = 2^(e - 1) exactly
    exponent = std::max(exponent, static_cast<int16_t>(e));
  }
}

bool Problem::Sees(int row, int64_t position) const {
  if (position < visible_sinks[row]) return true;
  if (position < visible[row].begin || position >= visible[row].end) return false;
  const int64_t page = PageOf(position);
  const auto local = static_cast<int>(position - PageBegin(page));
  if (const auto mask = live.find(page); mask != live.end() && !mask->second.Has(local)) return false;
  if (listed.empty()) return true;
  const auto rows = listed[row].find(page);
  return rows != listed[row].end() && local >= rows->second.begin && local < rows->second.end;
}

Problem Problem::WithRows(const std::vector<int>& rows) const {
  Problem some = *this;
  some.spec.rows = static_cast<int>(rows.size());
  const size_t stride = static_cast<size_t>(spec.shape.query_heads) * spec.shape.head_dim;
  some.queries.clear();
  some.visible.clear();
  some.visible_sinks.clear();
  some.listed.clear();
  for (const int row : rows) {
    some.queries.insert(some.queries.end(), &queries[row * stride], &queries[row * stride] + stride);
    some.visible.push_back(visible[row]);
    some.visible_sinks.push_back(visible_sinks[row]);
    if (!listed.empty()) some.listed.push_back(listed[row]);
  }
  return some;
}

DenseResult Problem::Oracle() const {
  DenseAttention dense;
  dense.rows = spec.rows;
  dense.query_heads = spec.shape.query_heads;
  dense.kv_heads = spec.shape.kv_heads;
  dense.head_dim = spec.shape.head_dim;
  dense.value_dim = spec.shape.value_dim;
  dense.scale = spec.shape.scale;
  dense.softcap = spec.shape.softcap;
  dense.queries = queries;
  dense.keys = keys;
  dense.values = values;
  dense.sink_logits = sink_logits;
  dense.sink_tokens = spec.sink_tokens;
  dense.sees = [this](int row, int64_t position) { return Sees(row, position); };
  return ReferenceAttention(dense);
}

std::vector<double> Problem::Magnitudes() const {
  Problem positive = *this;
  for (float& v : positive.values) v = std::abs(v);
  return positive.Oracle().outputs;
}

std::vector<float> Problem::PlainFloatAttention(bool fused) const {
  const auto multiply_add = [fused](float a, float b, float c) {
    return fused ? std::fma(a, b, c) : a * b + c;
  };
  constexpr int64_t kBlock = 512;
  const AttentionShape& shape = spec.shape;
  std::vector<float> outputs;
  for (int row = 0; row < spec.rows; ++row) {
    for (int head = 0; head < shape.query_heads; ++head) {
      const float* query = &queries[(static_cast<size_t>(row) * shape.query_heads + head) * shape.head_dim];
      const int kv_head = head / shape.gqa_group();
      float largest = -std::numeric_limits<float>::infinity();
      float total = 0;
      std::vector<float> sum(shape.value_dim, 0.0F);
      if (!sink_logits.empty()) {
        largest = sink_logits[head];
        total = 1;
      }
      for (int64_t block = 0; block < spec.positions; block += kBlock) {
        std::vector<std::pair<int64_t, float>> logits;
        for (int64_t j = block; j < std::min(block + kBlock, spec.positions); ++j) {
          if (!Sees(row, j)) continue;
          float dot = 0;
          for (int d = 0; d < shape.head_dim; ++d) {
            dot = multiply_add(query[d], keys[(j * shape.kv_heads + kv_head) * shape.head_dim + d], dot);
          }
          float logit = shape.scale * dot;
          if (shape.softcap > 0) logit = shape.softcap * std::tanh(logit / shape.softcap);
          logits.emplace_back(j, logit);
        }
        if (logits.empty()) continue;
        float block_largest = largest;
        for (const auto& [j, logit] : logits) block_largest = std::max(block_largest, logit);
        const float rescale = std::exp(largest - block_largest);
        largest = block_largest;
        total *= rescale;
        std::vector<float> block_sum(shape.value_dim, 0.0F);
        float block_total = 0;
        for (const auto& [j, logit] : logits) {
          const float weight = std::exp(logit - largest);
          block_total += weight;
          for (int c = 0; c < shape.value_dim; ++c) {
            block_sum[c] = multiply_add(weight, values[(j * shape.kv_heads + kv_head) * shape.value_dim + c],
                                        block_sum[c]);
          }
        }
        total += block_total;
        for (int c = 0; c < shape.value_dim; ++c) sum[c] = multiply_add(sum[c], rescale, block_sum[c]);
      }
      for (const float s : sum) outputs.push_back(total > 0 ? s / total : 0);
    }
  }
  return outputs;
}

bool Answer::operator==(const Answer& other) const {
  return SameBits(outputs, other.outputs) && SameBits(lse, other.lse) &&
         SameBits(sink_mass, other.sink_mass) && paths.sink == other.paths.sink &&
         paths.maximum == other.paths.maximum;
}

namespace {

// The lists of a rank that has `pages`.
OwnedPageLists ListsOf(const Problem& problem, absl::Span<const PageRef> pages) {
  if (problem.listed.empty()) {
    return OwnedPageLists(static_cast<int64_t>(pages.size()), problem.spec.rows);
  }
  OwnedPageLists lists;
  for (const std::map<int64_t, PageRows>& of_row : problem.listed) {
    std::vector<ListedPage> entries;
    for (size_t i = 0; i < pages.size(); ++i) {
      const auto rows = of_row.find(pages[i].index);
      if (rows == of_row.end()) continue;
      entries.push_back({static_cast<int32_t>(i), rows->second.begin, rows->second.end});
    }
    lists.AddRow(lists.AddList(entries));
  }
  return lists;
}

}  // namespace

RankGroup::~RankGroup() { Free(); }

void RankGroup::Free() {
  if (slab_ != nullptr) backends_[0]->FreeSlab(slab_, slab_bytes_);
  slab_ = nullptr;
}

void RankGroup::Load(const Problem& problem) {
  Free();
  const AttentionShape& shape = problem.spec.shape;
  page_bytes_ = backends_[0]->PageBytes(shape);
  slab_bytes_ = std::max<int64_t>(PageCount(problem.spec.positions), 1) * page_bytes_;
  slab_ = backends_[0]->AllocateSlab(slab_bytes_).value();

  // Whole pages of NaN, then the rows that anything may read, in two pieces where a page has more than one.
  std::vector<char> needed(problem.spec.positions, 0);
  for (int row = 0; row < problem.spec.rows; ++row) {
    for (int64_t j = 0; j < problem.spec.positions; ++j) {
      if (problem.Sees(row, j)) needed[j] = 1;
    }
  }
  const int64_t key_row = static_cast<int64_t>(shape.kv_heads) * shape.head_dim;
  const int64_t value_row = static_cast<int64_t>(shape.kv_heads) * shape.value_dim;
  const std::vector<char> nan_keys = Stored(std::vector<float>(kPageRows * key_row, kNaN), shape.key_dtype);
  const std::vector<char> nan_values =
      Stored(std::vector<float>(kPageRows * value_row, kNaN), shape.value_dtype);
  const std::vector<char> keys = Stored(problem.keys, shape.key_dtype);
  const std::vector<char> values = Stored(problem.values, shape.value_dtype);
  const auto key_bytes = static_cast<int64_t>(DTypeBytes(shape.key_dtype));
  const auto value_bytes = static_cast<int64_t>(DTypeBytes(shape.value_dtype));
  for (int64_t p = 0; p < PageCount(problem.spec.positions); ++p) {
    EDUBA_CHECK(
        backends_[0]->WriteRows(shape, page(p), 0, kPageRows, nan_keys.data(), nan_values.data()).ok());
    for (int64_t j = PageBegin(p); j < std::min(PageBegin(p + 1), problem.spec.positions);) {
      if (!needed[j]) {
        ++j;
        continue;
      }
      int64_t end = j + 1;
      while (end < std::min(PageBegin(p + 1), problem.spec.positions) && needed[end] && end - j < 77) ++end;
      EDUBA_CHECK(backends_[0]
                      ->WriteRows(shape, page(p), static_cast<int>(j - PageBegin(p)),
                                  static_cast<int>(end - j), &keys[j * key_row * key_bytes],
                                  &values[j * value_row * value_bytes])
                      .ok());
      j = end;
    }
  }
}

absl::StatusOr<Answer> RankGroup::Attend(const Problem& problem, const std::vector<int>& owners,
                                         bool reversed) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<Answer> answers,
                         AttendTogether(absl::MakeConstSpan(&problem, 1), owners, reversed));
  return answers[0];
}

absl::StatusOr<std::vector<Answer>> RankGroup::AttendTogether(absl::Span<const Problem> problems,
                                                              const std::vector<int>& owners, bool reversed) {
  // One problem on all ranks.
  struct Step {
    StepArgs args;
    std::vector<PageRef> sink_pages;
    std::vector<std::vector<PageRef>> owned;  // [ranks]
    std::vector<OwnedPageLists> lists;        // [ranks]
    std::vector<std::unique_ptr<AttentionStep>> ranks;
    std::vector<std::vector<int64_t>> sink_words, maximum_words;  // [ranks]
    std::vector<std::vector<float>> maxima;                       // [ranks]
    std::vector<int64_t> selected;
  };
  std::vector<Step> steps(problems.size());
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& problem = problems[i];
    Step& step = steps[i];
    step.owned.resize(backends_.size());
    for (int64_t p = 0; p < PageCount(problem.spec.positions); ++p) {
      const auto live = problem.live.find(p);
      step.owned[owners[p % owners.size()]].push_back(
          {page(p), p, live == problem.live.end() ? nullptr : live->second.words});
    }
    for (int64_t p = 0; p < PageCount(std::min<int64_t>(problem.spec.sink_tokens, problem.spec.positions));
         ++p) {
      step.sink_pages.push_back({page(p), p});
    }
    StepArgs& args = step.args;
    args.shape = problem.spec.shape;
    args.rows = problem.spec.rows;
    args.queries = problem.queries.data();
    if (!problem.sink_queries.empty()) args.sink_queries = problem.sink_queries.data();
    args.visible = problem.visible;
    args.sink_pages = step.sink_pages;
    args.visible_sinks = problem.visible_sinks;
    args.sink_logits = problem.sink_logits;
    args.exponents = problem.exponents;
    args.positions = problem.spec.positions;
    for (size_t rank = 0; rank < backends_.size(); ++rank) {
      if (reversed) std::reverse(step.owned[rank].begin(), step.owned[rank].end());
      args.pages = step.owned[rank];
      step.lists.push_back(ListsOf(problem, args.pages));
      args.lists = step.lists.back().view();
      EDUBA_ASSIGN_OR_RETURN(auto on_rank, backends_[rank]->StartStep(args));
      step.ranks.push_back(std::move(on_rank));
    }
  }

  const auto owner = [&](const Step& step) { return (&step - steps.data()) % backends_.size(); };
  const auto answers_on = [&](const Step& step, size_t rank) { return !one_answers || rank == owner(step); };
  // What an all-reduce does: afterwards every rank's numbers are the same.
  const auto reduce = [](auto& ranks, auto combine) {
    for (size_t i = 0; i < ranks[0].size(); ++i) {
      auto value = ranks[0][i];
      for (size_t rank = 1; rank < ranks.size(); ++rank) value = combine(value, ranks[rank][i]);
      for (auto& numbers : ranks) numbers[i] = value;
    }
  };
  // Afterwards the ranks that answer have the sums, and the others what was theirs.
  const auto sum = [&](const Step& step, std::vector<std::vector<int64_t>>& ranks) {
    const std::vector<std::vector<int64_t>> before = ranks;
    reduce(ranks, [](int64_t a, int64_t b) { return a + b; });
    words_.insert(words_.end(), ranks[0].begin(), ranks[0].end());
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      if (!answers_on(step, rank)) std::copy(before[rank].begin(), before[rank].end(), ranks[rank].begin());
    }
  };
  const auto largest = [](float a, float b) { return std::max(a, b); };
  words_.clear();
  for (Step& step : steps) {
    for (auto& on_rank : step.ranks) EDUBA_RETURN_IF_ERROR(on_rank->Attend());
  }
  for (Step& step : steps) {
    if (!step.args.has_sinks()) continue;
    for (auto& on_rank : step.ranks) {
      auto& words = step.sink_words.emplace_back(step.args.row_heads() * step.args.words_per_row_head());
      EDUBA_RETURN_IF_ERROR(on_rank->SinkSums(absl::MakeSpan(words)));
    }
    sum(step, step.sink_words);
  }
  for (Step& step : steps) {
    EDUBA_ASSIGN_OR_RETURN(const auto selected, step.ranks[owner(step)]->SelectForMaximum());
    step.selected.assign(selected.begin(), selected.end());
    for (size_t rank = 0; rank < backends_.size(); ++rank) {
      if (rank == owner(step)) continue;
      if (!answers_on(step, rank) && step.args.has_sinks()) {
        EDUBA_RETURN_IF_ERROR(step.ranks[rank]->TakeSelection(step.selected));
        const PathCounts taken = step.ranks[rank]->paths();
        const PathCounts chosen = step.ranks[owner(step)]->paths();
        EDUBA_CHECK(taken.maximum == chosen.maximum && taken.sink == chosen.sink);
        continue;
      }
      EDUBA_ASSIGN_OR_RETURN(const auto own, step.ranks[rank]->SelectForMaximum());
      EDUBA_CHECK(step.selected == own);
    }
  }
  for (Step& step : steps) {
    if (step.selected.empty()) continue;
    for (auto& on_rank : step.ranks) {
      auto& maxima = step.maxima.emplace_back(step.selected.size() * step.args.maxima_per_row_head());
      EDUBA_RETURN_IF_ERROR(on_rank->Maxima(absl::MakeSpan(maxima)));
    }
    reduce(step.maxima, largest);
  }
  for (Step& step : steps) {
    if (step.selected.empty()) continue;
    for (auto& on_rank : step.ranks) {
      auto& words = step.maximum_words.emplace_back(step.selected.size() * step.args.words_per_row_head());
      EDUBA_RETURN_IF_ERROR(on_rank->MaximumSums(absl::MakeSpan(words)));
    }
    sum(step, step.maximum_words);
  }

  std::vector<Answer> answers;
  for (Step& step : steps) {
    std::optional<Answer> first;
    absl::Status status;
    int64_t bytes_read = 0;
    for (size_t rank = 0; rank < backends_.size(); ++rank) {
      auto& on_rank = step.ranks[rank];
      bytes_read += on_rank->bytes_read();
      if (!answers_on(step, rank)) continue;
      Answer answer;
      answer.outputs.assign(step.args.row_heads() * step.args.shape.value_dim, kNaN);
      answer.lse.assign(step.args.row_heads(), kNaN);
      answer.sink_mass.assign(step.args.row_heads(), kNaN);
      const absl::Status finished =
          on_rank->Finish(answer.outputs.data(), answer.lse.data(), answer.sink_mass.data());
      answer.paths = on_rank->paths();
      if (!finished.ok()) {
        // The rank that met the fault names the page: keep that message.
        if (status.ok() || finished.message().size() > status.message().size()) status = finished;
        continue;
      }
      if (first) EDUBA_CHECK(*first == answer);  // Every rank can answer.
      first = answer;
    }
    if (!status.ok()) {
      EDUBA_CHECK(!first);  // All ranks fail together.
      return status;
    }
    first->bytes_read = bytes_read;
    answers.push_back(*std::move(first));
  }
  return answers;
}

namespace {

template <class Visit>
void ForEachError(const std::vector<float>& out, const std::vector<double>& wanted,
                  const std::vector<double>& scale, int value_dim, Visit visit) {
  for (size_t i = 0; i + value_dim <= wanted.size(); i += value_dim) {
    double error = 0;
    double norm = 0;
    for (int c = 0; c < value_dim; ++c) {
      error += (out[i + c] - wanted[i + c]) * (out[i + c] - wanted[i + c]);
      norm += scale[i + c] * scale[i + c];
    }
    visit(std::sqrt(error) <= 1e-36 ? 0 : std::sqrt(error / norm));  // NaN and inf included
  }
}

}  // namespace

double WorstError(const std::vector<float>& out, const std::vector<double>& wanted,
                  const std::vector<double>& scale, int value_dim) {
  double worst = 0;
  ForEachError(out, wanted, scale, value_dim, [&](double error) { worst = error <= worst ? worst : error; });
  return worst;
}

double TypicalError(const std::vector<float>& out, const std::vector<double>& wanted,
                    const std::vector<double>& scale, int value_dim) {
  double sum = 0;
  int64_t count = 0;
  ForEachError(out, wanted, scale, value_dim, [&](double error) {
    sum += error * error;
    ++count;
  });
  return std::sqrt(sum / static_cast<double>(std::max<int64_t>(count, 1)));
}

}  // namespace eduba
