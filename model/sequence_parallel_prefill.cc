#include "model/sequence_parallel_prefill.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "model/log_probs.h"

namespace eduba {
namespace {

// The fewest rows of a rank that attend together where all ranks' rows do: pages are read once for them.
constexpr int64_t kFewestRows = 32;

int64_t LongestSlice(const PrefillPlan& plan) {
  int64_t longest = 0;
  for (const PositionRange& slice : plan.slices) longest = std::max(longest, slice.size());
  return longest;
}

int64_t Count(absl::Span<const PositionRange> ranges) {
  int64_t count = 0;
  for (const PositionRange& range : ranges) count += range.size();
  return count;
}

}  // namespace

SequenceParallelPrefill::SequenceParallelPrefill(const Options& options, PrefillPlan plan, KvPages pages,
                                                 Rows rows)
    : options_(options),
      plan_(std::move(plan)),
      own_(plan_.slices[options.communicator->rank()]),
      width_(options.model->config().hidden_size),
      query_row_(int64_t{options.model->config().query_heads} * options.model->config().head_dim),
      pages_(std::move(pages)),
      rows_(std::move(rows)),
      angles_(options.model->NewAngles()),
      hidden_(options.model->NewHidden()),
      chunks_((LongestSlice(plan_) + options.chunk_rows - 1) / options.chunk_rows) {
  EDUBA_CHECK_EQ(static_cast<int64_t>(rows_.ids.size()), plan_.positions.size());
  for (size_t layer = 0; layer < rows_.views.size(); ++layer) {
    layer_pages_.push_back(
        PagesFor(plan_, rows_.views[layer], rows_.keeping[layer], pages_.placement(), pages_.index()));
  }
}

int64_t SequenceParallelPrefill::ExchangeRows(int layer) const {
  const auto rows_between = [&](int from, int to) {
    return Count(RowsToSend(plan_, rows_.views[layer], rows_.keeping[layer], from, to));
  };
  // What goes out to all, and of one message what is sent, and what is received and taken in.
  int64_t outgoing = 0;
  int64_t message = 0;
  for (int shift = 1; shift < ranks(); ++shift) {
    const int64_t sent = rows_between(rank(), (rank() + shift) % ranks());
    const int64_t received = rows_between((rank() + ranks() - shift) % ranks(), rank());
    outgoing += sent;
    message = std::max(message, sent + 2 * received);
  }
  return outgoing + message;
}

int64_t SequenceParallelPrefill::buffer_bytes() const {
  const auto tokens = static_cast<int64_t>(rows_.ids.size());
  const bool sinks = !rows_.sink_positions.empty();
  // Hidden states, queries, angles and positions of a row.
  int64_t row_bytes = 4 * (width_ + query_row_) + options_.model->angle_bytes() + 8;
  if (sinks) row_bytes += 4 * query_row_ + options_.model->angle_bytes() + 8;
  int64_t bytes = own_.size() * row_bytes + 4 * tokens;
  // Chunks of everybody's queries, and answers to one of them.
  bytes += (ranks() + 1) * std::min(options_.chunk_rows, LongestSlice(plan_)) * 4 * query_row_;
  bytes += RoundBytes();
  int64_t exchange_rows = 0;
  for (int layer = 0; layer < static_cast<int>(rows_.views.size()); ++layer) {
    exchange_rows = std::max(exchange_rows, ExchangeRows(layer));
  }
  bytes += exchange_rows * (pages_.key_bytes() + pages_.value_bytes());
  // Log-probabilities are kept as words, as words to be summed, and as floats.
  if (rows_.log_probs) bytes += tokens * (8 + 8 + 4);
  if (rows_.part) bytes += rows_.part->bytes();
  return bytes;
}

absl::Status SequenceParallelPrefill::Reserve() {
  std::vector<std::vector<int64_t>> kept;
  int64_t spare = 0;
  for (const PrefillPages& pages : layer_pages_) {
    kept.push_back(pages.kept);
    spare = std::max(spare, static_cast<int64_t>(pages.lent.size()));
  }
  EDUBA_ASSIGN_OR_RETURN(ReservedBytes buffers, options_.store->ReserveBytes(buffer_bytes()));
  std::vector<int64_t> positions(own_.size());
  std::iota(positions.begin(), positions.end(), own_.begin);
  absl::Status status = options_.model->Angles({positions, rows_.sink_positions}, angles_);
  if (status.ok()) status = hidden_.Reserve(own_.size() * width_);
  if (status.ok()) {
    auto reserved = pages_.Reserve(plan_.positions.begin, kept, spare);
    status = reserved.status();
    if (reserved.ok()) spare_ = *std::move(reserved);
  }
  if (!status.ok()) {
    angles_ = options_.model->NewAngles();
    hidden_ = options_.model->NewHidden();
    if (!absl::IsResourceExhausted(status)) options_.communicator->Abort(status);
    return status;
  }
  buffers_ = std::move(buffers);
  queries_.resize(own_.size() * query_row_);
  if (!rows_.sink_positions.empty()) sink_queries_.resize(queries_.size());
  if (rows_.log_probs) log_prob_words_.resize(rows_.ids.size());
  return absl::OkStatus();
}

absl::Status SequenceParallelPrefill::Run(int64_t units, absl::Time deadline) {
  absl::Status status = RunUnits(units, deadline);
  // After an error before a collective, no rank shall wait for a rank that will not come.
  if (!status.ok()) options_.communicator->Abort(status);
  return status;
}

absl::Status SequenceParallelPrefill::Note(const absl::Status& status) {
  if (!absl::IsInvalidArgument(status)) return status;
  if (status_.ok()) status_ = status;
  return absl::OkStatus();
}

// A round's queries, and what its steps have in progress that those of one chunk have not.
int64_t SequenceParallelPrefill::RoundBytes() const {
  int64_t sink_tokens = -1;
  for (const LayerView& view : rows_.views) {
    if (view.policy == Policy::kGlobal) sink_tokens = std::max(sink_tokens, view.sink_tokens);
  }
  if (sink_tokens < 0) return 0;
  const AttentionShape& shape = pages_.shape();
  const int64_t rows = ranks() * RoundRows();
  return rows * 4 * query_row_ +
         std::max<int64_t>(0, rows - options_.chunk_rows) * PagedAttention::RowBytes(shape, sink_tokens) +
         (ranks() - 1) * sink_tokens * 4 * shape.kv_heads * (shape.head_dim + shape.value_dim);
}

int64_t SequenceParallelPrefill::RoundRows() const {
  const int64_t share = (options_.chunk_rows / 2 + ranks() - 1) / ranks();
  return std::min({options_.chunk_rows, LongestSlice(plan_), std::max(share, kFewestRows)});
}

PositionRange SequenceParallelPrefill::ChunkOf(int rank) const {
  const PositionRange& slice = plan_.slices[rank];
  const int64_t begin = slice.begin + chunk_ * options_.chunk_rows;
  return PositionRange{begin, begin + options_.chunk_rows}.Intersect(slice);
}

absl::Status SequenceParallelPrefill::RunUnits(int64_t units, absl::Time deadline) {
  while (units > 0 && !done()) {
    const bool last_chunk = chunk_ + 1 == chunks_;
    Stage next = stage_;
    switch (stage_) {
      case Stage::kProject:
        if (chunk_ == 0) BeginLayer();
        EDUBA_RETURN_IF_ERROR(Project());
        if (last_chunk) next = Stage::kExchange;
        --units;
        break;
      case Stage::kExchange:
        EDUBA_RETURN_IF_ERROR(Exchange(deadline));
        next = Stage::kAttend;
        --units;
        break;
      case Stage::kAttend:
        if (view().policy == Policy::kGlobal) {
          EDUBA_RETURN_IF_ERROR(AttendAll(deadline));
          units -= ranks();  // The rows of all ranks.
        } else {
          EDUBA_RETURN_IF_ERROR(AttendWindow(deadline));
          --units;
        }
        if (last_chunk) {
          EndLayer();
          ++layer_;
          next = layer_ < static_cast<int>(rows_.views.size()) ? Stage::kProject : Stage::kOutputs;
        }
        break;
      case Stage::kOutputs:
        EDUBA_RETURN_IF_ERROR(Outputs());
        // Beside log-probabilities, which read the whole vocabulary, the rest is little.
        units -= rows_.log_probs ? units_of_a_chunk() : 1;
        if (last_chunk) next = Stage::kCombine;
        break;
      case Stage::kCombine:
        EDUBA_RETURN_IF_ERROR(Combine(deadline));
        next = Stage::kDone;
        --units;
        break;
      case Stage::kDone:
        break;
    }
    chunk_ = next == stage_ && !last_chunk ? chunk_ + 1 : 0;
    stage_ = next;
  }
  return absl::OkStatus();
}

void SequenceParallelPrefill::BeginLayer() {
  pages_.Lend(layer_, layer_pages_[layer_].lent, spare_);
  std::vector<PositionRange> wanted;
  for (int to = 0; to < ranks(); ++to) {
    const auto rows = RowsToSend(plan_, view(), rows_.keeping[layer_], rank(), to);
    wanted.insert(wanted.end(), rows.begin(), rows.end());
  }
  for (const PositionRange& range : Union(std::move(wanted))) {
    outgoing_.push_back({range,
                         {range.size(), std::vector<char>(range.size() * pages_.key_bytes()),
                          std::vector<char>(range.size() * pages_.value_bytes())}});
  }
}

void SequenceParallelPrefill::EndLayer() {
  pages_.TakeBack(layer_, layer_pages_[layer_].lent, spare_);
  outgoing_.clear();
}

absl::Status SequenceParallelPrefill::Project() {
  const PositionRange chunk = ChunkOf(rank());
  if (chunk.empty() || !status_.ok()) return absl::OkStatus();
  const int64_t first = chunk.begin - own_.begin;
  if (layer_ == 0) {
    const auto ids =
        absl::MakeConstSpan(rows_.ids).subspan(chunk.begin - plan_.positions.begin, chunk.size());
    EDUBA_RETURN_IF_ERROR(Note(options_.model->Embed(ids, Hidden(chunk.begin))));
    if (!status_.ok()) return absl::OkStatus();
    hidden_.Send(first * width_, chunk.size() * width_);
  }
  const absl::StatusOr<LayerRows> made =
      options_.model->BeforeAttention(layer_, angles_, first, chunk.size(), hidden_);
  EDUBA_RETURN_IF_ERROR(Note(made.status()));
  if (!made.ok()) return absl::OkStatus();
  std::copy_n(made->queries, chunk.size() * query_row_, &queries_[first * query_row_]);
  if (!sink_queries_.empty()) {
    std::copy_n(made->sink_queries, chunk.size() * query_row_, &sink_queries_[first * query_row_]);
  }
  const StoredRows stored = pages_.Round(chunk.size(), made->keys, made->values);
  EDUBA_RETURN_IF_ERROR(pages_.Write(layer_, chunk.begin, stored));
  for (Outgoing& out : outgoing_) {
    const PositionRange some = out.range.Intersect(chunk);
    if (some.empty()) continue;
    const auto copy = [&](const std::vector<char>& from, std::vector<char>& to, int64_t bytes) {
      std::memcpy(&to[(some.begin - out.range.begin) * bytes], &from[(some.begin - chunk.begin) * bytes],
                  some.size() * bytes);
    };
    copy(stored.keys, out.stored.keys, pages_.key_bytes());
    copy(stored.values, out.stored.values, pages_.value_bytes());
  }
  return absl::OkStatus();
}

absl::Status SequenceParallelPrefill::Exchange(absl::Time deadline) {
  const auto rows_between = [&](int from, int to) {
    return Count(RowsToSend(plan_, view(), rows_.keeping[layer_], from, to));
  };
  const int64_t row_bytes = pages_.key_bytes() + pages_.value_bytes();
  for (int shift = 1; shift < ranks(); ++shift) {
    bool any = false;
    for (int from = 0; from < ranks(); ++from) any |= rows_between(from, (from + shift) % ranks()) > 0;
    if (!any) continue;
    const int to = (rank() + shift) % ranks();
    const int from = (rank() + ranks() - shift) % ranks();
    const std::vector<char> sent = Message(to);
    std::vector<char> received(rows_between(from, rank()) * row_bytes);
    EDUBA_RETURN_IF_ERROR(options_.communicator->SendReceive(
        sent, sent.empty() ? -1 : to, absl::MakeSpan(received), received.empty() ? -1 : from, deadline));
    EDUBA_RETURN_IF_ERROR(TakeIn(from, received));
  }
  return absl::OkStatus();
}

// The rows' keys and then their values, range by range.
std::vector<char> SequenceParallelPrefill::Message(int to) const {
  std::vector<char> message;
  for (const PositionRange& range : RowsToSend(plan_, view(), rows_.keeping[layer_], rank(), to)) {
    const auto holds = [&](const Outgoing& out) {
      return out.range.begin <= range.begin && range.end <= out.range.end;
    };
    const auto out = std::find_if(outgoing_.begin(), outgoing_.end(), holds);
    EDUBA_CHECK(out != outgoing_.end());
    const auto add = [&](const std::vector<char>& from, int64_t bytes) {
      const auto begin = from.begin() + (range.begin - out->range.begin) * bytes;
      message.insert(message.end(), begin, begin + range.size() * bytes);
    };
    add(out->stored.keys, pages_.key_bytes());
    add(out->stored.values, pages_.value_bytes());
  }
  return message;
}

absl::Status SequenceParallelPrefill::TakeIn(int from, absl::Span<const char> message) {
  const char* at = message.data();
  for (const PositionRange& range : RowsToSend(plan_, view(), rows_.keeping[layer_], from, rank())) {
    const auto take = [&](int64_t bytes) {
      const char* const begin = at;
      at += range.size() * bytes;
      return std::vector<char>(begin, at);
    };
    StoredRows stored{range.size(), take(pages_.key_bytes()), {}};
    stored.values = take(pages_.value_bytes());
    EDUBA_RETURN_IF_ERROR(pages_.Write(layer_, range.begin, stored));
  }
  return absl::OkStatus();
}

absl::Status SequenceParallelPrefill::AttendWindow(absl::Time deadline) {
  const PositionRange chunk = ChunkOf(rank());
  if (chunk.empty() || !status_.ok()) return absl::OkStatus();
  const int64_t first = (chunk.begin - own_.begin) * query_row_;
  LayerRows call{layer_, chunk.size(), &queries_[first], &queries_[first], nullptr, nullptr};
  if (!sink_queries_.empty()) call.sink_queries = &sink_queries_[first];
  const ContextRows context{&pages_, chunk.begin, chunk.size(), rows_.views};
  PagedAttention attention(options_.backend, options_.model, absl::MakeConstSpan(&context, 1), nullptr,
                           deadline);
  EDUBA_ASSIGN_OR_RETURN(float* const attended, options_.model->Attended(chunk.size()));
  EDUBA_RETURN_IF_ERROR(
      Note(Annotate(attention.AttendWritten(call, attended), absl::StrCat("layer ", layer_))));
  if (status_.ok()) {
    options_.model->AfterAttention(layer_, chunk.begin - own_.begin, chunk.size(), hidden_);
  }
  return absl::OkStatus();
}

absl::Status SequenceParallelPrefill::AttendAll(absl::Time deadline) {
  EDUBA_CHECK(sink_queries_.empty());  // Every key would need a query of its own.
  EDUBA_ASSIGN_OR_RETURN(const std::vector<float> queries, GatherQueries(deadline));
  const PositionRange own = ChunkOf(rank());
  EDUBA_ASSIGN_OR_RETURN(float* const attended, options_.model->Attended(own.size()));
  const int64_t round_rows = RoundRows();
  std::vector<float> asked;  // In a round.
  asked.reserve(ranks() * round_rows * query_row_);
  for (int64_t at = 0; at < options_.chunk_rows; at += round_rows) {
    asked.clear();
    std::vector<ContextRows> contexts;
    const float* of_rank = queries.data();
    for (int asker = 0; asker < ranks(); ++asker) {
      const PositionRange chunk = ChunkOf(asker);
      const PositionRange some =
          PositionRange{chunk.begin + at, chunk.begin + at + round_rows}.Intersect(chunk);
      if (!some.empty()) {
        contexts.push_back({&pages_, some.begin, some.size(), rows_.views, asker});
        asked.insert(asked.end(), of_rank + at * query_row_, of_rank + (at + some.size()) * query_row_);
      }
      of_rank += chunk.size() * query_row_;
    }
    if (contexts.empty()) break;
    const auto rows = static_cast<int64_t>(asked.size()) / query_row_;
    const LayerRows call{layer_, rows, asked.data(), asked.data(), nullptr, nullptr};
    PagedAttention attention(options_.backend, options_.model, contexts, options_.communicator, deadline);
    float* const outputs = attended + std::min(at, own.size()) * query_row_;
    EDUBA_RETURN_IF_ERROR(
        Note(Annotate(attention.AttendWritten(call, outputs), absl::StrCat("layer ", layer_))));
  }
  if (!own.empty() && status_.ok()) {
    options_.model->AfterAttention(layer_, own.begin - own_.begin, own.size(), hidden_);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> SequenceParallelPrefill::GatherQueries(absl::Time deadline) const {
  std::vector<int64_t> begins(ranks() + 1);
  for (int r = 0; r < ranks(); ++r) begins[r + 1] = begins[r] + ChunkOf(r).size() * query_row_;
  std::vector<float> queries(begins.back());
  const auto of = [&](int r) {
    return absl::MakeSpan(queries).subspan(begins[r], begins[r + 1] - begins[r]);
  };
  const absl::Span<float> mine = of(rank());
  if (!mine.empty()) {
    std::copy_n(&queries_[(ChunkOf(rank()).begin - own_.begin) * query_row_], mine.size(), mine.data());
  }
  for (int shift = 1; shift < ranks(); ++shift) {
    const int to = (rank() + shift) % ranks();
    const int from = (rank() + ranks() - shift) % ranks();
    EDUBA_RETURN_IF_ERROR(options_.communicator->SendReceive(AsBytes(absl::Span<const float>(mine)),
                                                             mine.empty() ? -1 : to, AsBytes(of(from)),
                                                             of(from).empty() ? -1 : from, deadline));
  }
  return queries;
}

absl::Status SequenceParallelPrefill::Outputs() {
  const PositionRange chunk = ChunkOf(rank());
  if (chunk.empty() || !status_.ok()) return absl::OkStatus();
  EDUBA_RETURN_IF_ERROR(Note(options_.model->FinalNorm(chunk.begin - own_.begin, chunk.size(), hidden_)));
  if (!status_.ok()) return absl::OkStatus();
  if (rows_.part) rows_.part->Add(chunk.begin, chunk.size(), Hidden(chunk.begin));
  if (!rows_.log_probs) return absl::OkStatus();
  const int64_t begin = plan_.positions.begin;
  const auto predict = [&](absl::Span<const float> hidden, PositionRange tokens) {
    const auto ids = absl::MakeConstSpan(rows_.ids).subspan(tokens.begin - begin, tokens.size());
    EDUBA_ASSIGN_OR_RETURN(const std::vector<float> some, LogProbs(*options_.model, hidden, ids));
    for (size_t i = 0; i < some.size(); ++i) {
      log_prob_words_[tokens.begin - begin + static_cast<int64_t>(i)] = std::bit_cast<uint32_t>(some[i]);
    }
    return absl::OkStatus();
  };
  if (chunk.begin == begin) {
    EDUBA_CHECK(!rows_.before.empty());
    EDUBA_RETURN_IF_ERROR(Note(predict(rows_.before, {begin, begin + 1})));
  }
  // A row predicts the token after it; the last row's prediction is for whoever reads on.
  const PositionRange tokens = PositionRange{chunk.begin + 1, chunk.end + 1}.Intersect(plan_.positions);
  if (!tokens.empty()) {
    const auto hidden = absl::MakeConstSpan(Hidden(chunk.begin), tokens.size() * width_);
    EDUBA_RETURN_IF_ERROR(Note(predict(hidden, tokens)));
  }
  return absl::OkStatus();
}

// Everything has one owner, and the others add zeros: a sum of bits is a gathering.
absl::Status SequenceParallelPrefill::Combine(absl::Time deadline) {
  std::vector<int64_t> words(1 + width_);
  words[0] = status_.ok() ? 0 : 1;
  if (own_.end == plan_.positions.end && status_.ok()) {
    const float* const last = Hidden(own_.end - 1);
    for (int64_t c = 0; c < width_; ++c) words[1 + c] = std::bit_cast<uint32_t>(last[c]);
  }
  words.insert(words.end(), log_prob_words_.begin(), log_prob_words_.end());
  EDUBA_RETURN_IF_ERROR(options_.communicator->SumI64(absl::MakeSpan(words), deadline));
  if (rows_.part) {
    EDUBA_RETURN_IF_ERROR(options_.communicator->SumI64(rows_.part->words(), deadline));
  }
  if (words[0] != 0) {
    if (status_.ok()) {
      status_ = absl::InvalidArgumentError(
          absl::StrCat("arithmetic left the finite numbers on ", words[0], " other ranks"));
    }
    return absl::OkStatus();
  }
  const auto floats = [&](int64_t first, int64_t count) {
    std::vector<float> gathered(count);
    for (int64_t i = 0; i < count; ++i) {
      gathered[i] = std::bit_cast<float>(static_cast<uint32_t>(words[first + i]));
    }
    return gathered;
  };
  last_ = floats(1, width_);
  log_probs_ = floats(1 + width_, static_cast<int64_t>(log_prob_words_.size()));
  return absl::OkStatus();
}

}  // namespace eduba
