#include "model/engine.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "collective/broadcast.h"
#include "collective/bytes.h"
#include "model/log_probs.h"

namespace eduba {
namespace {

// Of one message of a hand-over: it passes through memory that no budget has counted.
constexpr int64_t kHandOverRows = 4096;

bool IsWindowed(ContextPolicy policy) { return policy != ContextPolicy::kModel; }

// The index that a row's query has for the token sinks.
int64_t SinkPosition(const ContextOptions& options, int64_t position) {
  switch (options.positions) {
    case PositionMode::kAbsolute:
      return position;
    case PositionMode::kRolling:
      return std::min(position, options.sink_tokens + options.window - 1);
    case PositionMode::kClamped:
      return std::min(position, options.clamp);
  }
  return position;
}

LayerKeeping Keeping(const LayerView& append, const LayerView& ask) {
  LayerKeeping keeping;
  keeping.sink_tokens = std::max(append.sink_tokens, ask.sink_tokens);
  keeping.window = std::max(append.window, ask.window);
  keeping.owned = append.policy != Policy::kWindow || ask.policy != Policy::kWindow;
  return keeping;
}

}  // namespace

bool Context::windowed() const {
  return std::none_of(keeping_.begin(), keeping_.end(),
                      [](const LayerKeeping& keeping) { return keeping.owned; });
}

int64_t Context::page_bytes() const { return pages_.bytes(); }

absl::StatusOr<Context> ModelEngine::Open(const ContextOptions& given, const Placement& placement,
                                          int index) const {
  ContextOptions options = given;
  const ModelConfig& config = options_.model->config();
  if (options.sink_tokens < 0 || options.sink_tokens > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("sink_tokens is ", options.sink_tokens, ", wanted 0 or more"));
  }
  if (IsWindowed(options.policy) ? options.window < 1 || options.window > kMaxPositions
                                 : options.window != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "window is ", options.window, ", wanted ",
        IsWindowed(options.policy) ? "at least 1" : "0: with this policy the model's own windows hold"));
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
  shape.dtype = options_.kv_dtype;
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
    append_views.push_back(IsWindowed(options.policy) ? streaming : own);
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

absl::StatusOr<Context> ModelEngine::Open(const ContextOptions& options, int64_t stripe_pages) const {
  if (options_.communicator == nullptr) return Open(options, Placement::OfRanks(1, stripe_pages), 0);
  return Open(options, Placement::OfRanks(options_.communicator->size(), stripe_pages),
              options_.communicator->rank());
}

absl::Status ModelEngine::ReserveTogether(absl::Span<const Turn> turns, absl::Time deadline) const {
  absl::Status room;
  for (const Turn& turn : turns) {
    if (room.ok()) room = Prepare(turn);
  }
  if (options_.communicator == nullptr) return room;
  // Memory is the one thing that ranks differ in.
  EDUBA_ASSIGN_OR_RETURN(const int64_t ranks_without, CountNo(room.ok(), deadline));
  if (!room.ok() || ranks_without == 0) return room;
  return NoMemoryElsewhere(ranks_without);
}

absl::Status ModelEngine::NoMemoryElsewhere(int64_t ranks) {
  return absl::ResourceExhaustedError(
      absl::StrCat("no memory for the next tokens on ", ranks, " of the other workers; ",
                   "delete a session or start the workers with more --memory-bytes"));
}

absl::Status ModelEngine::Prepare(const Turn& turn) const {
  EDUBA_CHECK(!turn.ids.empty());
  const auto count = static_cast<int64_t>(turn.ids.size());
  if (count > kMaxPositions - turn.context->length_) {
    return absl::OutOfRangeError(absl::StrCat("context of ", turn.context->length_, " tokens and ", count,
                                              " more; at most ", kMaxPositions, " are possible"));
  }
  absl::Status status = turn.context->pages_.Reserve(turn.context->length_, turn.context->length_ + count);
  // A rank whose device is broken is not one without memory, and cannot go on with the others.
  if (!status.ok() && !absl::IsResourceExhausted(status) && options_.communicator != nullptr) {
    options_.communicator->Abort(status);
  }
  return status;
}

RowPositions ModelEngine::Positions(absl::Span<const Turn> turns) {
  positions_.clear();
  sink_positions_.clear();
  bool differ = false;
  for (const Turn& turn : turns) {
    for (size_t i = 0; i < turn.ids.size(); ++i) {
      const int64_t position = turn.context->length_ + static_cast<int64_t>(i);
      positions_.push_back(position);
      sink_positions_.push_back(SinkPosition(turn.context->options_, position));
      differ |= sink_positions_.back() != position;
    }
  }
  return {positions_, differ ? absl::MakeConstSpan(sink_positions_) : absl::Span<const int64_t>()};
}

absl::Status ModelEngine::Compute(absl::Span<const Turn> turns, absl::Time deadline) {
  const ModelConfig& config = options_.model->config();
  std::vector<int32_t> ids;
  std::vector<ContextRows> contexts;
  for (const Turn& turn : turns) {
    ids.insert(ids.end(), turn.ids.begin(), turn.ids.end());
    Context& context = *turn.context;
    contexts.push_back({&context.pages_, context.length_, static_cast<int64_t>(turn.ids.size()),
                        turn.asks ? context.ask_views_ : context.append_views_});
  }
  hidden_size_ = static_cast<int64_t>(ids.size()) * config.hidden_size;
  EDUBA_RETURN_IF_ERROR(hidden_.Reserve(hidden_size_));
  EDUBA_RETURN_IF_ERROR(options_.model->Embed(ids, hidden_.host()));
  PagedAttention attention(options_.backend, options_.model, contexts, options_.communicator, deadline);
  EDUBA_RETURN_IF_ERROR(options_.model->Forward(Positions(turns), attention, hidden_));
  sink_mass_ = attention.sink_mass();
  bytes_read_ = attention.bytes_read();
  return absl::OkStatus();
}

absl::Status ModelEngine::Step(absl::Span<const Turn> turns) {
  if (turns.empty()) return absl::OkStatus();
  const absl::Time deadline = absl::Now() + options_.collective_timeout;
  if (absl::Status status = ReserveTogether(turns, deadline); !status.ok()) {
    for (const Turn& turn : turns) Unprepare(*turn.context);
    return status;
  }
  return StepPrepared(turns, deadline);
}

absl::Status ModelEngine::StepPrepared(absl::Span<const Turn> turns, absl::Time deadline) {
  if (turns.empty()) return absl::OkStatus();
  if (absl::Status status = Compute(turns, deadline); !status.ok()) {
    for (const Turn& turn : turns) Unprepare(*turn.context);
    // This rank's device, or memory: no rank shall wait for it. (What is not finite is so on all of them.)
    if (!absl::IsInvalidArgument(status) && options_.communicator != nullptr) {
      options_.communicator->Abort(status);
    }
    return status;
  }
  const ModelConfig& config = options_.model->config();
  int64_t row = 0;
  for (const Turn& turn : turns) {
    Context& context = *turn.context;
    row += static_cast<int64_t>(turn.ids.size());
    context.length_ += static_cast<int64_t>(turn.ids.size());
    const float* last = hidden_.host() + (row - 1) * config.hidden_size;
    context.last_.assign(last, last + config.hidden_size);
    DropUnseen(context, context.length_);
  }
  return absl::OkStatus();
}

void ModelEngine::DropUnseen(Context& context, int64_t next) const {
  for (size_t layer = 0; layer < context.keeping_.size(); ++layer) {
    // What no later row sees; or no later window, and others own it.
    const LayerKeeping& keeping = context.keeping_[layer];
    if (keeping.window == 0) continue;
    context.pages_.Drop(static_cast<int>(layer), {keeping.sink_tokens, next - keeping.window + 1},
                        keeping.owned);
  }
}

int64_t ModelEngine::NextChunk(const Context& context, int64_t left) const {
  const int64_t stripe_rows = context.pages_.placement().stripe_pages * kPageRows;
  const int64_t in_stripe = context.length_ % stripe_rows;
  const int64_t end = std::min(stripe_rows, (in_stripe / options_.chunk_rows + 1) * options_.chunk_rows);
  return std::min(left, end - in_stripe);
}

void ModelEngine::Follow(Context& context) const {
  // What the row itself sees stays, in case that it did not come about.
  DropUnseen(context, context.length_);
  ++context.length_;
}

void ModelEngine::Unfollow(Context& context) const {
  --context.length_;
  Unprepare(context);
}

absl::Status ModelEngine::HandOver(Context& context, int home, absl::Span<int32_t> ids,
                                   absl::Time deadline) const {
  if (ids.empty() || options_.communicator->size() == 1) return absl::OkStatus();
  Communicator& group = *options_.communicator;
  context.last_.resize(options_.model->config().hidden_size);
  absl::Status status = Broadcast(group, home, AsBytes(ids), deadline);
  if (status.ok()) status = Broadcast(group, home, AsBytes(absl::MakeSpan(context.last_)), deadline);
  const int64_t begin = context.length_ - static_cast<int64_t>(ids.size());
  for (int layer = 0; status.ok() && layer < static_cast<int>(context.keeping_.size()); ++layer) {
    status = HandOverLayer(context, layer, home, begin, deadline);
  }
  // An error ahead of a message: no rank shall wait for one that will not come.
  if (!status.ok()) group.Abort(status);
  DropUnseen(context, context.length_);
  return status;
}

absl::Status ModelEngine::HandOverLayer(Context& context, int layer, int home, int64_t begin,
                                        absl::Time deadline) const {
  Communicator& group = *options_.communicator;
  const LayerKeeping& keeping = context.keeping_[layer];
  const PositionRange all{begin, context.length_};
  for (const PositionRange& range :
       Union({PositionRange{0, keeping.sink_tokens}.Intersect(all),
              PositionRange{context.length_ - keeping.window + 1, context.length_}.Intersect(all)})) {
    for (int64_t at = range.begin; at < range.end; at += kHandOverRows) {
      const PositionRange some = PositionRange{at, at + kHandOverRows}.Intersect(range);
      const int64_t key_bytes = some.size() * context.pages_.key_bytes();
      std::vector<char> message(key_bytes + some.size() * context.pages_.value_bytes());
      if (group.rank() == home) {
        EDUBA_ASSIGN_OR_RETURN(const StoredRows rows, context.pages_.Read(layer, some));
        std::copy(rows.values.begin(), rows.values.end(),
                  std::copy(rows.keys.begin(), rows.keys.end(), message.begin()));
      }
      EDUBA_RETURN_IF_ERROR(Broadcast(group, home, absl::MakeSpan(message), deadline));
      if (group.rank() != home) {
        const auto values = message.begin() + key_bytes;
        EDUBA_RETURN_IF_ERROR(context.pages_.Write(
            layer, some.begin, {some.size(), {message.begin(), values}, {values, message.end()}}));
      }
    }
  }
  return absl::OkStatus();
}

std::unique_ptr<Wave> ModelEngine::StartWave(const Context& context, absl::Span<const int32_t> ids, bool asks,
                                             bool log_probs, const Pooler* pooler) const {
  if (options_.communicator == nullptr) return nullptr;
  const int64_t begin = context.length_;
  const int64_t end = begin + std::min(static_cast<int64_t>(ids.size()), kMaxPositions - begin);
  const std::optional<WavePlan> plan = PlanWave({begin, end}, context.pages_.placement());
  if (!plan) return nullptr;
  Wave::Rows rows;
  const auto taken = ids.first(plan->positions.size());
  rows.ids.assign(taken.begin(), taken.end());
  rows.views = asks ? context.ask_views_ : context.append_views_;
  rows.keeping = context.keeping_;
  const PositionRange& own = plan->slices[options_.communicator->rank()];
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
  return std::make_unique<Wave>(Wave::Options{options_.backend, options_.store, options_.model,
                                              options_.communicator, options_.chunk_rows},
                                *plan, context.pages_.Fork(), std::move(rows));
}

void ModelEngine::FinishWave(Wave& wave, Context& context, Pooler* pooler) const {
  EDUBA_CHECK(wave.done() && wave.status().ok());
  EDUBA_CHECK_EQ(context.length_, wave.plan().positions.begin);
  context.pages_ = wave.TakePages();
  context.length_ = wave.plan().positions.end;
  context.last_ = wave.last();
  DropUnseen(context, context.length_);
  if (pooler != nullptr) pooler->AddPart(*wave.part());
}

absl::StatusOr<int64_t> ModelEngine::CountNo(bool yes, absl::Time deadline) const {
  int64_t no = yes ? 0 : 1;
  EDUBA_RETURN_IF_ERROR(options_.communicator->SumI64(absl::MakeSpan(&no, 1), deadline));
  return no;
}

absl::StatusOr<bool> ModelEngine::AppendWave(Context& context, absl::Span<const int32_t> ids,
                                             const ContextAppendOptions& options,
                                             std::vector<float>& log_probs, int64_t& in_chunks_until) {
  const std::unique_ptr<Wave> wave = StartWave(context, ids, options.asks, options.log_probs, options.pooler);
  if (wave == nullptr) {
    in_chunks_until = context.length_ + static_cast<int64_t>(ids.size());
    return false;
  }
  EDUBA_ASSIGN_OR_RETURN(const int64_t without_room,
                         CountNo(wave->Reserve().ok(), absl::Now() + options_.collective_timeout));
  while (without_room == 0 && !wave->done()) {
    if (absl::Now() >= options.deadline) return absl::DeadlineExceededError("the deadline is over");
    EDUBA_RETURN_IF_ERROR(wave->Run(wave->units_of_a_chunk(), absl::Now() + options_.collective_timeout));
  }
  if (without_room > 0 || !wave->status().ok()) {
    in_chunks_until = wave->plan().positions.end;
    return false;
  }
  FinishWave(*wave, context, options.pooler);
  log_probs.insert(log_probs.end(), wave->log_probs().begin(), wave->log_probs().end());
  return true;
}

absl::StatusOr<std::vector<float>> ModelEngine::Append(Context& context, absl::Span<const int32_t> ids,
                                                       const ContextAppendOptions& options) {
  if (options.log_probs && context.length_ == 0 && !ids.empty()) {
    return absl::FailedPreconditionError(
        "the first token of a context has no probability; append one before, for example the model's "
        "beginning of sequence");
  }
  const int64_t width = options_.model->config().hidden_size;
  std::vector<float> log_probs;
  std::vector<float> before;  // The hidden states that predict a chunk's tokens.
  const auto count = static_cast<int64_t>(ids.size());
  const int64_t begin = context.length_;
  int64_t in_chunks_until = begin;
  while (context.length_ - begin < count) {
    const int64_t at = context.length_ - begin;
    absl::Status status;
    if (context.length_ >= in_chunks_until) {
      const absl::StatusOr<bool> waved =
          AppendWave(context, ids.subspan(at), options, log_probs, in_chunks_until);
      if (waved.ok() && *waved) continue;
      status = waved.status();
    }
    const int64_t rows = NextChunk(context, count - at);
    const absl::Span<const int32_t> chunk = ids.subspan(at, rows);
    if (options.log_probs) before = context.last_;
    const int64_t first = context.length_;
    if (status.ok()) {
      status = absl::Now() < options.deadline ? Step({Turn{&context, chunk, options.asks}})
                                              : absl::DeadlineExceededError("the deadline is over");
    }
    if (status.ok() && options.pooler != nullptr) options.pooler->Add(first, rows, hidden_.host());
    if (status.ok() && options.log_probs) {
      before.insert(before.end(), hidden_.host(), hidden_.host() + (rows - 1) * width);
      const auto some = eduba::LogProbs(*options_.model, before, chunk);
      status = some.status();
      if (some.ok()) log_probs.insert(log_probs.end(), some->begin(), some->end());
    }
    if (!status.ok()) {
      return Annotate(status,
                      absl::StrCat("append of ", count, " tokens, ", context.length_ - begin,
                                   " of which are in the context (", context.length_, " tokens long)"));
    }
  }
  return log_probs;
}

absl::StatusOr<Generation> ModelEngine::Generate(Context& context, const GenerateOptions& options) {
  EDUBA_RETURN_IF_ERROR(CheckSampling(options.sampling));
  if (options.max_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens is ", options.max_tokens, ", wanted 0 or more"));
  }
  if (context.length_ == 0) {
    return absl::FailedPreconditionError("the context is empty; append a prompt before generating");
  }
  Generation generation;
  for (int64_t n = 0; n < options.max_tokens; ++n) {
    if (absl::Now() >= options.deadline) {
      generation.reason = FinishReason::kDeadline;
      break;
    }
    const absl::StatusOr<std::vector<float>> logits = NextLogits(context);
    absl::Status status = logits.status();
    TokenChoice token;
    if (status.ok()) {
      token = ChooseToken(*logits, options.sampling, context.length_);
      status = Step({Turn{&context, absl::MakeConstSpan(&token.id, 1), true}});
    }
    EDUBA_RETURN_IF_ERROR(
        Annotate(status, absl::StrCat("generation, ", n, " tokens of which are in the context")));
    generation.tokens.push_back(token);
    const bool go_on = !options.on_token || options.on_token(token);
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), token.id) != options.stop_ids.end()) {
      generation.reason = FinishReason::kStop;
      break;
    }
    if (!go_on) {
      generation.reason = FinishReason::kCancelled;
      break;
    }
  }
  return generation;
}

absl::StatusOr<std::vector<float>> ModelEngine::Score(const Context& context, absl::Span<const int32_t> ids) {
  Context fork = context.Fork();
  ContextAppendOptions options;
  options.asks = true;
  options.log_probs = true;
  return Append(fork, ids, options);
}

absl::StatusOr<std::vector<float>> ModelEngine::Embed(const Context& context, absl::Span<const int32_t> ids,
                                                      std::vector<PositionRange> ranges, Pool pool) {
  EDUBA_ASSIGN_OR_RETURN(Pooler pooler,
                         Pooler::Create(std::move(ranges), pool, options_.model->hidden_exponents()));
  Context fork = context.Fork();
  ContextAppendOptions options;
  options.asks = true;
  options.pooler = &pooler;
  EDUBA_RETURN_IF_ERROR(Append(fork, ids, options).status());
  return pooler.Finish();
}

absl::StatusOr<std::vector<float>> ModelEngine::NextLogits(const Context& context) const {
  EDUBA_CHECK(context.length_ > 0);
  return Logits(context.last_);
}

absl::StatusOr<std::vector<float>> ModelEngine::Logits(absl::Span<const float> hidden) const {
  const int64_t rows = static_cast<int64_t>(hidden.size()) / options_.model->config().hidden_size;
  EDUBA_ASSIGN_OR_RETURN(const absl::Span<const float> logits, options_.model->Logits(hidden.data(), rows));
  return std::vector<float>(logits.begin(), logits.end());
}

}  // namespace eduba
