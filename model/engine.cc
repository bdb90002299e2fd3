#include "model/engine.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "collective/broadcast.h"

namespace eduba {
namespace {

// Rows of one message of ShareRows: it passes through memory that no budget has counted.
constexpr int64_t kSharedRows = 4096;

LayerKeeping Keeping(const LayerView& append, const LayerView& ask) {
  LayerKeeping keeping;
  keeping.sink_tokens = std::max(append.sink_tokens, ask.sink_tokens);
  keeping.window = std::max(append.window, ask.window);
  keeping.owned = append.policy != Policy::kWindow || ask.policy != Policy::kWindow;
  return keeping;
}

}  // namespace

absl::StatusOr<Context> ModelEngine::Open(const ContextOptions& given, const Placement& placement,
                                          int index) const {
  EDUBA_CHECK(index >= 0 && index < placement.size());
  ContextOptions options = given;
  const ModelConfig& config = options_.model->config();
  const bool has_window = options.policy != ContextPolicy::kModel;
  if (options.sink_tokens < 0 || options.sink_tokens > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("sink_tokens is ", options.sink_tokens, ", wanted 0 or more"));
  }
  if (has_window ? options.window < 1 || options.window > kMaxPositions : options.window != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("window is ", options.window, ", wanted ",
                     has_window ? "at least 1" : "0: with this policy the model's own windows hold"));
  }
  if (options.positions != PositionMode::kAbsolute && options.policy != ContextPolicy::kStreaming) {
    return absl::InvalidArgumentError(
        "rolling and clamped positions need the streaming policy: other layers see keys at every distance");
  }
  if (options.positions == PositionMode::kClamped) {
    if (options.clamp == 0) options.clamp = config.trained_positions - 1;
    if (options.clamp < 0) {
      return absl::InvalidArgumentError(absl::StrCat("clamp is ", options.clamp, ", wanted at least 1"));
    }
  }

  AttentionShape shape;
  shape.query_heads = config.query_heads;
  shape.kv_heads = config.kv_heads;
  shape.head_dim = shape.value_dim = config.head_dim;
  shape.key_dtype = shape.value_dtype = options_.kv_dtype;
  shape.scale = config.attention_scale;
  shape.softcap = config.attention_softcap;
  std::vector<LayerView> append_views;
  std::vector<LayerView> ask_views;
  std::vector<LayerKeeping> keeping;
  std::vector<LayerPages> pages;
  for (const LayerConfig& layer : config.layers) {
    const LayerView own = layer.window > 0 ? LayerView{Policy::kWindow, 0, layer.window}
                                           : LayerView{Policy::kGlobal, options.sink_tokens, 0};
    const int64_t window = layer.window > 0 ? std::min(layer.window, options.window) : options.window;
    const LayerView streaming{Policy::kWindow, options.sink_tokens, window};
    append_views.push_back(has_window ? streaming : own);
    ask_views.push_back(options.policy == ContextPolicy::kStreaming ? streaming : own);
    // A window needs its pages wherever it is computed, so a layer that has one takes in all.
    const bool windowed =
        append_views.back().policy == Policy::kWindow || ask_views.back().policy == Policy::kWindow;
    pages.push_back({!windowed, options.sink_tokens});
    keeping.push_back(Keeping(append_views.back(), ask_views.back()));
  }
  Context context(options, KvPages(options_.backend, options_.store, shape, placement, index, pages));
  context.append_views_ = std::move(append_views);
  context.ask_views_ = std::move(ask_views);
  context.keeping_ = std::move(keeping);
  return context;
}

absl::Status ModelEngine::NoMemoryElsewhere(int64_t ranks) {
  return absl::ResourceExhaustedError(
      absl::StrCat("no memory for the next tokens on ", ranks, " of the other workers; ",
                   "delete a session or start the workers with more --memory-bytes"));
}

absl::Status ModelEngine::Prepare(const BatchEntry& entry) const {
  EDUBA_CHECK(!entry.ids.empty());
  const auto count = static_cast<int64_t>(entry.ids.size());
  if (count > kMaxPositions - entry.context->length_) {
    return absl::OutOfRangeError(absl::StrCat("context of ", entry.context->length_, " tokens and ", count,
                                              " more; at most ", kMaxPositions, " are possible"));
  }
  return entry.context->pages_.Reserve(entry.context->length_, entry.context->length_ + count);
}

RowPositions ModelEngine::Positions(absl::Span<const BatchEntry> entries) {
  positions_.clear();
  sink_positions_.clear();
  bool differ = false;
  for (const BatchEntry& entry : entries) {
    for (size_t i = 0; i < entry.ids.size(); ++i) {
      const int64_t position = entry.context->length_ + static_cast<int64_t>(i);
      positions_.push_back(position);
      sink_positions_.push_back(SinkPosition(entry.context->options_, position));
      differ |= sink_positions_.back() != position;
    }
  }
  return {positions_, differ ? absl::MakeConstSpan(sink_positions_) : absl::Span<const int64_t>()};
}

absl::Status ModelEngine::Compute(absl::Span<const BatchEntry> entries, Communicator& group,
                                  absl::Time deadline) {
  const ModelConfig& config = options_.model->config();
  std::vector<int32_t> ids;
  std::vector<ContextRows> contexts;
  for (const BatchEntry& entry : entries) {
    ids.insert(ids.end(), entry.ids.begin(), entry.ids.end());
    Context& context = *entry.context;
    contexts.push_back({&context.pages_, context.length_, static_cast<int64_t>(entry.ids.size()),
                        entry.asks ? context.ask_views_ : context.append_views_});
  }
  hidden_size_ = static_cast<int64_t>(ids.size()) * config.hidden_size;
  EDUBA_RETURN_IF_ERROR(hidden_.Reserve(hidden_size_));
  EDUBA_RETURN_IF_ERROR(options_.model->Embed(ids, hidden_.host()));
  PagedAttention attention(options_.backend, options_.model, contexts, &group, deadline);
  EDUBA_RETURN_IF_ERROR(options_.model->Forward(Positions(entries), attention, hidden_));
  sink_mass_ = attention.sink_mass();
  bytes_read_ = attention.bytes_read();
  return absl::OkStatus();
}

absl::Status ModelEngine::Step(absl::Span<const BatchEntry> entries, Communicator& group,
                               absl::Time deadline) {
  if (entries.empty()) return absl::OkStatus();
  if (absl::Status status = Compute(entries, group, deadline); !status.ok()) {
    for (const BatchEntry& entry : entries) ReleaseReservation(*entry.context);
    // This rank's device or memory failed: no rank shall wait for it. (What is not finite is so on all.)
    if (!absl::IsInvalidArgument(status)) group.Abort(status);
    return status;
  }
  const ModelConfig& config = options_.model->config();
  int64_t row = 0;
  for (const BatchEntry& entry : entries) {
    Context& context = *entry.context;
    row += static_cast<int64_t>(entry.ids.size());
    context.length_ += static_cast<int64_t>(entry.ids.size());
    const float* last = hidden_.host() + (row - 1) * config.hidden_size;
    context.last_.assign(last, last + config.hidden_size);
    DropUnseen(context, context.length_);
  }
  return absl::OkStatus();
}

void ModelEngine::DropUnseen(Context& context, int64_t next) const {
  for (size_t layer = 0; layer < context.keeping_.size(); ++layer) {
    // What no later row sees; or no later window sees, and another rank owns.
    const LayerKeeping& keeping = context.keeping_[layer];
    if (keeping.window == 0) continue;
    context.pages_.Drop(static_cast<int>(layer), {keeping.sink_tokens, next - keeping.window + 1},
                        keeping.owned);
  }
}

int64_t ModelEngine::NextChunk(const Context& context, int64_t left) const {
  const int64_t stripe_rows = context.placement().stripe_pages * kPageRows;
  const int64_t in_stripe = context.length_ % stripe_rows;
  const int64_t end = std::min(stripe_rows, (in_stripe / options_.chunk_rows + 1) * options_.chunk_rows);
  return std::min(left, end - in_stripe);
}

void ModelEngine::SkipRow(Context& context) const {
  // What the row itself sees stays, in case that the owner rank's step failed.
  DropUnseen(context, context.length_);
  ++context.length_;
}

void ModelEngine::UnskipRow(Context& context) const {
  --context.length_;
  ReleaseReservation(context);
}

absl::Status ModelEngine::ShareRows(Context& context, int owner_rank, absl::Span<int32_t> ids,
                                    Communicator& group, absl::Time deadline) const {
  if (ids.empty() || group.size() == 1) return absl::OkStatus();
  std::vector<float> last = context.last_;
  last.resize(options_.model->config().hidden_size);
  absl::Status status = Broadcast(group, owner_rank, AsBytes(ids), deadline);
  if (status.ok()) status = Broadcast(group, owner_rank, AsBytes(absl::MakeSpan(last)), deadline);
  const int64_t begin = context.length_ - static_cast<int64_t>(ids.size());
  for (int layer = 0; status.ok() && layer < static_cast<int>(context.keeping_.size()); ++layer) {
    status = ShareLayer(context, layer, owner_rank, begin, group, deadline);
  }
  if (!status.ok()) {
    // An error before a message: no rank shall wait for one that will not come.
    group.Abort(status);
    return status;
  }
  context.last_ = std::move(last);
  DropUnseen(context, context.length_);
  return absl::OkStatus();
}

absl::Status ModelEngine::ShareLayer(Context& context, int layer, int owner_rank, int64_t begin,
                                     Communicator& group, absl::Time deadline) const {
  const LayerKeeping& keeping = context.keeping_[layer];
  const PositionRange all{begin, context.length_};
  for (const PositionRange& range :
       Union({PositionRange{0, keeping.sink_tokens}.Intersect(all),
              PositionRange{context.length_ - keeping.window + 1, context.length_}.Intersect(all)})) {
    for (int64_t at = range.begin; at < range.end; at += kSharedRows) {
      const PositionRange some = PositionRange{at, at + kSharedRows}.Intersect(range);
      const int64_t key_bytes = some.size() * context.pages_.key_bytes();
      std::vector<char> message(key_bytes + some.size() * context.pages_.value_bytes());
      if (group.rank() == owner_rank) {
        EDUBA_ASSIGN_OR_RETURN(const StoredRows rows, context.pages_.Read(layer, some));
        std::copy(rows.values.begin(), rows.values.end(),
                  std::copy(rows.keys.begin(), rows.keys.end(), message.begin()));
      }
      EDUBA_RETURN_IF_ERROR(Broadcast(group, owner_rank, absl::MakeSpan(message), deadline));
      if (group.rank() != owner_rank) {
        const auto values = message.begin() + key_bytes;
        EDUBA_RETURN_IF_ERROR(context.pages_.Write(
            layer, some.begin, {some.size(), {message.begin(), values}, {values, message.end()}}));
      }
    }
  }
  return absl::OkStatus();
}

std::unique_ptr<SequenceParallelPrefill> ModelEngine::StartPrefill(const Context& context,
                                                                   absl::Span<const int32_t> ids, bool asks,
                                                                   bool log_probs, const Pooler* pooler,
                                                                   Communicator& group) const {
  const int64_t begin = context.length_;
  const int64_t end = begin + std::min(static_cast<int64_t>(ids.size()), kMaxPositions - begin);
  const std::optional<PrefillPlan> plan = PlanPrefill({begin, end}, context.placement());
  if (!plan) return nullptr;
  SequenceParallelPrefill::Rows rows;
  const auto taken = ids.first(plan->positions.size());
  rows.ids.assign(taken.begin(), taken.end());
  rows.views = asks ? context.ask_views_ : context.append_views_;
  rows.keeping = context.keeping_;
  const PositionRange& own = plan->slices[group.rank()];
  // Where the last row's is its own position, all are.
  if (!own.empty() && SinkPosition(context.options_, own.end - 1) != own.end - 1) {
    rows.sink_positions.reserve(own.size());
    for (int64_t position = own.begin; position < own.end; ++position) {
      rows.sink_positions.push_back(SinkPosition(context.options_, position));
    }
  }
  rows.before = context.last_;
  rows.log_probs = log_probs;
  if (pooler != nullptr) rows.part = pooler->Part(plan->positions);
  SequenceParallelPrefill::Options options;
  options.backend = options_.backend;
  options.store = options_.store;
  options.model = options_.model;
  options.communicator = &group;
  options.chunk_rows = options_.chunk_rows;
  return std::make_unique<SequenceParallelPrefill>(options, *plan, context.pages_.Fork(), std::move(rows));
}

void ModelEngine::FinishPrefill(SequenceParallelPrefill& prefill, Context& context, Pooler* pooler) const {
  EDUBA_CHECK(prefill.done() && prefill.status().ok());
  EDUBA_CHECK_EQ(context.length_, prefill.plan().positions.begin);
  context.pages_ = prefill.TakePages();
  context.length_ = prefill.plan().positions.end;
  context.last_ = prefill.last();
  DropUnseen(context, context.length_);
  if (pooler != nullptr) pooler->AddPart(*prefill.part());
}

absl::StatusOr<std::vector<float>> ModelEngine::Logits(absl::Span<const float> hidden) const {
  const int64_t rows = static_cast<int64_t>(hidden.size()) / options_.model->config().hidden_size;
  EDUBA_ASSIGN_OR_RETURN(const absl::Span<const float> logits, options_.model->Logits(hidden.data(), rows));
  return std::vector<float>(logits.begin(), logits.end());
}

}  // namespace eduba
