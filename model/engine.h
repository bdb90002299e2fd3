#ifndef EDUBA_MODEL_ENGINE_H_
#define EDUBA_MODEL_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "attention/page_store.h"
#include "base/placement.h"
#include "collective/communicator.h"
#include "kernels/backend.h"
#include "model/kv_pages.h"
#include "model/paged_attention.h"
#include "model/pooler.h"
#include "model/sampler.h"
#include "model/transformer.h"
#include "model/wave.h"
#include "model/wave_plan.h"

namespace eduba {

enum class ContextPolicy : uint8_t {
  kModel,      // The model's own layers: windows where its configuration has them, all keys elsewhere.
  kStreaming,  // Every layer sees token sinks and a window (StreamingLLM, Xiao et al., 2023): constant
               // memory.
  kStar,       // As kStreaming while appending; what is asked or generated sees all keys.
};

enum class PositionMode : uint8_t {
  kAbsolute,  // Rotary positions are positions.
  // Those of StreamingLLM's cache: sinks and window without the gap between them. Keys of the window keep
  // their distances; the sinks are scored with a query at index min(position, sink tokens + window - 1).
  kRolling,
  kClamped,  // The sinks are scored with a query at index min(position, clamp).
};

// What never changes about a context.
struct ContextOptions {
  ContextPolicy policy = ContextPolicy::kModel;
  PositionMode positions = PositionMode::kAbsolute;  // Others than kAbsolute need kStreaming.
  // The first tokens, which windows keep. With kModel they only anchor the merge (docs/numerics.md) of layers
  // without a window, and change nothing but the last bits.
  int64_t sink_tokens = 4;
  // kStreaming, kStar: positions that a row sees, itself included, sinks not counted. A layer whose own
  // window is smaller keeps that.
  int64_t window = 0;
  int64_t clamp = 0;  // kClamped: the largest index; 0: the last that the model was trained for.
};

class ModelEngine;

// A sequence of tokens as a model has read it. Belongs to the engine that made it, which must outlive it.
class Context {
 public:
  // The same content, sharing its pages until one of the two goes on.
  Context Fork() const { return *this; }

  const ContextOptions& options() const { return options_; }
  int64_t length() const { return length_; }
  // [hidden_size]: the hidden state of the last token; empty at the beginning.
  absl::Span<const float> last() const { return last_; }
  // No row, appended or asked, sees more of a layer than token sinks and a window, which every rank has: one
  // rank can compute it alone.
  bool windowed() const;
  // Pages held, in bytes; what forks share counts for each.
  int64_t page_bytes() const;

 private:
  friend class ModelEngine;
  Context(const ContextOptions& options, KvPages pages) : options_(options), pages_(std::move(pages)) {}

  ContextOptions options_;
  KvPages pages_;
  std::vector<LayerView> append_views_, ask_views_;  // [layers]
  std::vector<LayerKeeping> keeping_;                // [layers]: what the views need behind an append.
  int64_t length_ = 0;
  std::vector<float> last_;  // [hidden_size]: of the last token, empty at the beginning.
};

// Some tokens that go on behind a context.
struct Turn {
  Context* context = nullptr;
  absl::Span<const int32_t> ids;  // At least one.
  bool asks = false;              // Asked or generated, for ContextPolicy::kStar; else appended.
};

struct ContextAppendOptions {
  bool asks = false;         // As Turn::asks.
  bool log_probs = false;    // Wanted; each token's, given all before it. Needs a context that is not empty.
  Pooler* pooler = nullptr;  // Is given the hidden states, at their positions.
  absl::Time deadline = absl::InfiniteFuture();
};

struct GenerateOptions {
  int64_t max_tokens = 0;
  SamplingOptions sampling;
  std::vector<int32_t> stop_ids;
  absl::Time deadline = absl::InfiniteFuture();
  // Called with every token as it comes; false ends the generation behind it. May be empty.
  std::function<bool(const TokenChoice&)> on_token;
};

enum class FinishReason : uint8_t { kLength, kStop, kCancelled, kDeadline };

struct Generation {
  std::vector<TokenChoice> tokens;  // All of them are in the context now, a stop token too.
  FinishReason reason = FinishReason::kLength;
};

// A worker's model: contexts, and what is asked of them. On the ranks of a group every rank makes the same
// calls in the same order and gets the same answers. Each keeps its own pages of the layers that see all
// keys. In a step it computes all rows; a long append is taken in waves, in which each rank computes the rows
// of its own pages (docs/adr/0007-model-sessions.md, "replicated rows" and "striped rows"). An answer depends
// on the context's tokens and options and on the question, not on chunks, batches, forks, threads or ranks,
// bit for bit. One call at a time.
class ModelEngine {
 public:
  struct Options {
    Backend* backend = nullptr;
    PageStore* store = nullptr;
    Transformer* model = nullptr;
    DType kv_dtype = DType::kF32;
    int64_t chunk_rows = 256;  // Rows of one step of a long append: what another context waits for.
    Communicator* communicator = nullptr;  // Of the group; null: this worker is alone.
    int64_t stripe_pages = 64;             // Pages that are placed together. The same on all ranks.
    absl::Duration collective_timeout = absl::Seconds(30);  // For all collectives of one step.
  };

  // What `options` points to outlives the engine.
  explicit ModelEngine(const Options& options) : options_(options), hidden_(options.model->NewHidden()) {}

  // INVALID_ARGUMENT names the option that contradicts the model or another.
  absl::StatusOr<Context> Open(const ContextOptions& options) const {
    return Open(options, options_.stripe_pages);
  }
  // With stripes of its own.
  absl::StatusOr<Context> Open(const ContextOptions& options, int64_t stripe_pages) const;
  // Under a placement whose nodes are the ranks in their order, as number `index` of them.
  absl::StatusOr<Context> Open(const ContextOptions& options, const Placement& placement, int index) const;

  // One step for all turns together; each context at most once. Either all go on or none.
  //   INVALID_ARGUMENT    a token is not in the vocabulary, or arithmetic left the finite numbers
  //   OUT_OF_RANGE        the context would be longer than kMaxPositions
  //   RESOURCE_EXHAUSTED  no pages left, on this or another rank
  // Any other error is the communicator's, which is dead then.
  absl::Status Step(absl::Span<const Turn> turns);

  // Step in two parts, for a caller whose ranks agree on memory by themselves, turn by turn.
  //   OUT_OF_RANGE, RESOURCE_EXHAUSTED  as Step's, for this rank; nothing was taken
  // Any other error is that of this rank's device; the communicator is dead then.
  absl::Status Prepare(const Turn& turn) const;
  // What a rank that has room says where others have none: RESOURCE_EXHAUSTED.
  static absl::Status NoMemoryElsewhere(int64_t ranks);
  // Gives the memory back: the step will not come.
  void Unprepare(Context& context) const { context.pages_.Truncate(context.length_); }
  // REQUIRES: every rank has prepared all turns. INVALID_ARGUMENT or the communicator's errors, as Step's;
  // `deadline` is for the collectives, of which there are none where every context is windowed().
  absl::Status StepPrepared(absl::Span<const Turn> turns, absl::Time deadline);

  // Of `left` more tokens of an append, as many as its next chunk has. Chunks end at multiples of chunk_rows
  // from where a stripe begins, and where it ends. A wave ends there too: so an append that fails at some
  // token has read as much on any number of ranks.
  int64_t NextChunk(const Context& context, int64_t left) const;

  // One rank, the home, goes on with a windowed() context alone, by StepPrepared with turns of one token; the
  // others Follow each of them, for which they have prepared, and in the end all HandOver. In between the
  // others know the context's length only, and may do nothing else with it. Nobody waits for anybody before
  // the end: the last Follow may be undone, where its row did not come about at home.
  void Follow(Context& context) const;
  void Unfollow(Context& context) const;
  // All ranks have now what the home has of positions [length - ids, length): keys and values as far as a
  // later row sees them, the last hidden state, and the tokens, which the home gives in `ids` and the others
  // get there. As many messages one after another as Broadcast, for each layer and once more. Errors as the
  // communicator's, which is dead then. REQUIRES: a communicator.
  absl::Status HandOver(Context& context, int home, absl::Span<int32_t> ids, absl::Time deadline) const;

  // A part of an append that the ranks share out; null where it is too short for that. `ids` go on behind the
  // context, as a Turn's do, and are taken from their beginning as far as the wave's plan says. `pooler` (or
  // null) takes the states with FinishWave; nothing else of the context changes before.
  std::unique_ptr<Wave> StartWave(const Context& context, absl::Span<const int32_t> ids, bool asks,
                                  bool log_probs, const Pooler* pooler) const;
  // The wave's rows are in the context now. REQUIRES: the wave is done and its status is OK; the context is
  // as it was at the start.
  void FinishWave(Wave& wave, Context& context, Pooler* pooler) const;

  // Wave by wave and chunk by chunk. A wave that fails is read again in chunks. An error leaves the context
  // with the chunks that were done before (and with one that was read, but has no finite log-probs); the
  // message says how long it is. Also DEADLINE_EXCEEDED. Returns log-probs [ids] where they were wanted, else
  // nothing.
  absl::StatusOr<std::vector<float>> Append(Context& context, absl::Span<const int32_t> ids,
                                            const ContextAppendOptions& options = {});

  // Goes on until max_tokens, a stop token, on_token or the deadline. Needs a context that is not empty:
  // FAILED_PRECONDITION.
  absl::StatusOr<Generation> Generate(Context& context, const GenerateOptions& options);

  // ln P(ids[i] | context, ids[..i)). The context stays as it is.
  absl::StatusOr<std::vector<float>> Score(const Context& context, absl::Span<const int32_t> ids);

  // [ranges, hidden_size]: hidden states of `ids` behind the context, pooled over ranges of positions (those
  // of the ids begin at context.length()). The context stays as it is. What is already in a context is pooled
  // while it is appended.
  absl::StatusOr<std::vector<float>> Embed(const Context& context, absl::Span<const int32_t> ids,
                                           std::vector<PositionRange> ranges, Pool pool);

  // [vocab_size] for the token behind the context, which is not empty. INVALID_ARGUMENT as Logits.
  absl::StatusOr<std::vector<float>> NextLogits(const Context& context) const;
  // [rows, vocab_size] from hidden states [rows, hidden_size]: those of several contexts read the weights
  // once. INVALID_ARGUMENT where one is not finite.
  absl::StatusOr<std::vector<float>> Logits(absl::Span<const float> hidden) const;
  // [rows, hidden_size]: what the last step made of its turns' tokens, turn after turn.
  absl::Span<const float> hidden() const { return absl::MakeConstSpan(hidden_.host(), hidden_size_); }
  // Of the last step: the token sinks' share of each head's weights, summed over the rows of each turn, in
  // units of kSinkMassUnit. [turns, layers, query_heads]
  const std::vector<int64_t>& sink_mass() const { return sink_mass_; }
  // Bytes of keys and values that the last step read.
  int64_t bytes_read() const { return bytes_read_; }

 private:
  // Gives back what no row at position `next` or behind it sees.
  void DropUnseen(Context& context, int64_t next) const;
  absl::Status HandOverLayer(Context& context, int layer, int home, int64_t begin, absl::Time deadline) const;
  // Whether the next rows of `ids` are in the context now, as a wave; or are to be read in chunks up to
  // `*in_chunks_until`.
  absl::StatusOr<bool> AppendWave(Context& context, absl::Span<const int32_t> ids,
                                  const ContextAppendOptions& options, std::vector<float>& log_probs,
                                  int64_t& in_chunks_until);
  // How many ranks say no; the same on all.
  absl::StatusOr<int64_t> CountNo(bool yes, absl::Time deadline) const;
  // Whether all ranks have room for the turns: the same on all ranks.
  absl::Status ReserveTogether(absl::Span<const Turn> turns, absl::Time deadline) const;
  // Everything of a prepared step that may fail.
  absl::Status Compute(absl::Span<const Turn> turns, absl::Time deadline);
  RowPositions Positions(absl::Span<const Turn> turns);

  const Options options_;
  std::vector<int64_t> positions_, sink_positions_;
  LayerFloats hidden_;  // [rows, hidden_size] of the last step
  int64_t hidden_size_ = 0;
  std::vector<int64_t> sink_mass_;
  int64_t bytes_read_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_ENGINE_H_
