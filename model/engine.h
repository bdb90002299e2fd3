#ifndef EDUBA_MODEL_ENGINE_H_
#define EDUBA_MODEL_ENGINE_H_

#include <cstdint>
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
#include "model/context.h"
#include "model/pooler.h"
#include "model/sequence_parallel_prefill.h"
#include "model/transformer.h"

namespace eduba {

// Tokens that one context reads in one step: a chunk of an append, or one generated token.
struct BatchEntry {
  Context* context = nullptr;
  absl::Span<const int32_t> ids;  // At least one.
  bool asks = false;              // Asked or generated, which matters to ContextPolicy::kStar; else appended.
};

// One node's model: it opens contexts and computes the steps by which they grow. What it does not know is why
// a step is made: model/job_loop.h decides that, and calls the parts below in an order that is the same on
// all ranks.
//
// Every rank of a group keeps the token sinks and the windows of a context, and of layers whose rows see all
// keys the pages that it owns. In a step all ranks compute all rows; only the keys of other ranks' pages meet
// in a collective (docs/adr/0007-model-sessions.md, "replicated rows"). A long append is shared out instead:
// SequenceParallelPrefill ("striped rows"). An answer depends on the context's tokens and options and on the
// question, not on chunks, batches, forks, threads or ranks, bit for bit.
//
// One call at a time. The engine lives as long as the node; communicators come and go, so that each call that
// needs one is given it. After a communicator's error it is dead, and the engine and its contexts are not.
class ModelEngine {
 public:
  struct Options {
    Backend* backend = nullptr;  // These three outlive the engine.
    PageStore* store = nullptr;
    Transformer* model = nullptr;
    DType kv_dtype = DType::kF32;
    // Rows of one step of a long append: how long a token that another context generates has to wait.
    int64_t chunk_rows = 256;
  };

  explicit ModelEngine(const Options& options) : options_(options), hidden_(options.model->NewHidden()) {}

  // An empty context, of which this node keeps what `placement` gives to its node `index`. A group that makes
  // steps of it has the placement's nodes as its ranks. INVALID_ARGUMENT names the option that contradicts
  // the model or another.
  absl::StatusOr<Context> Open(const ContextOptions& options, const Placement& placement, int index) const;

  // Reserves the memory that an entry needs.
  //   OUT_OF_RANGE        the context would be longer than kMaxPositions
  //   RESOURCE_EXHAUSTED  this node has no memory for it
  // and nothing was taken. Any other error is that of this node's device.
  absl::Status Prepare(const BatchEntry& entry) const;
  // What a rank that has memory says where others have none: RESOURCE_EXHAUSTED.
  static absl::Status NoMemoryElsewhere(int64_t ranks);
  // Gives back what Prepare reserved: the step will not be made.
  void ReleaseReservation(Context& context) const { context.pages_.Truncate(context.length_); }
  // Computes one step for all entries together; each context occurs at most once. Either all contexts grow or
  // none does. REQUIRES: every rank of the group has prepared all entries.
  //   INVALID_ARGUMENT    a token is not in the vocabulary, or arithmetic left the finite numbers; the same
  //                       on all ranks
  // Any other error is that of this node's device or of the group; the group is dead. `deadline` is for the
  // collectives, of which there are none where every layer of every context sees a window.
  absl::Status Step(absl::Span<const BatchEntry> entries, Communicator& group, absl::Time deadline);
  // How many of `left` more tokens of an append its next step reads. Steps end at multiples of chunk_rows
  // from where a stripe begins, and where it ends, as sequence-parallel prefill does: so an append that fails
  // at some token has read as much on any number of ranks.
  int64_t NextChunk(const Context& context, int64_t left) const;

  // A generation whose every layer sees a window is computed by one rank alone, the owner rank: it makes
  // steps of one token. For each of them the other ranks prepare and call SkipRow: they count the row and do
  // not compute it, and may do nothing else with the context, until all ranks call ShareRows. Nobody waits
  // for anybody before that. UnskipRow takes the last SkipRow back, where the owner rank's step failed.
  void SkipRow(Context& context) const;
  void UnskipRow(Context& context) const;
  // Gives all ranks what the owner rank computed of positions [length - ids, length): keys and values as far
  // as a later row sees them, the last hidden state, and the tokens, which the owner rank gives in `ids` and
  // the others receive there. It takes as many messages one after another as Broadcast, for each layer and
  // twice more. Any error is the group's, which is dead; the others' last hidden state is the old one then.
  absl::Status ShareRows(Context& context, int owner_rank, absl::Span<int32_t> ids, Communicator& group,
                         absl::Time deadline) const;

  // A part of an append that the ranks of the group share out; null where it is too short for that, or there
  // is one rank only. `ids` come after the context, and the prefill takes the first plan().positions.size()
  // of them. `asks` is as in BatchEntry; `log_probs`: wanted. `pooler` (or null) takes the hidden states with
  // FinishPrefill; nothing of the context changes before. The group outlives the prefill.
  std::unique_ptr<SequenceParallelPrefill> StartPrefill(const Context& context, absl::Span<const int32_t> ids,
                                                        bool asks, bool log_probs, const Pooler* pooler,
                                                        Communicator& group) const;
  // Puts the prefill's rows into the context. REQUIRES: it is done and its status is OK; the context is as it
  // was at the start.
  void FinishPrefill(SequenceParallelPrefill& prefill, Context& context, Pooler* pooler) const;

  // [rows, vocab_size] from hidden states [rows, hidden_size]: several rows read the weights once.
  // INVALID_ARGUMENT where a logit is not finite.
  absl::StatusOr<std::vector<float>> Logits(absl::Span<const float> hidden) const;

  // The last step's hidden states: [rows, hidden_size], entry after entry.
  absl::Span<const float> hidden() const { return absl::MakeConstSpan(hidden_.host(), hidden_size_); }
  // [entries, layers, query_heads]: the token sinks' share of each head's weights, summed over the rows of
  // each entry, in units of kSinkMassUnit.
  const std::vector<int64_t>& sink_mass() const { return sink_mass_; }
  // Bytes of keys and values that this node read.
  int64_t bytes_read() const { return bytes_read_; }

  const Options& options() const { return options_; }
  Transformer& model() const { return *options_.model; }

 private:
  // Gives back what no row at position `next` or after it sees.
  void DropUnseen(Context& context, int64_t next) const;
  absl::Status ShareLayer(Context& context, int layer, int owner_rank, int64_t begin, Communicator& group,
                          absl::Time deadline) const;
  // Everything of a step that may fail.
  absl::Status Compute(absl::Span<const BatchEntry> entries, Communicator& group, absl::Time deadline);
  RowPositions Positions(absl::Span<const BatchEntry> entries);

  const Options options_;
  std::vector<int64_t> positions_, sink_positions_;  // [rows] of the last step.
  LayerFloats hidden_;                               // [rows, hidden_size] of the last step.
  int64_t hidden_size_ = 0;                          // Its floats.
  std::vector<int64_t> sink_mass_;
  int64_t bytes_read_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_ENGINE_H_
