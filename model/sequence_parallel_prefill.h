#ifndef EDUBA_MODEL_SEQUENCE_PARALLEL_PREFILL_H_
#define EDUBA_MODEL_SEQUENCE_PARALLEL_PREFILL_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "attention/page_store.h"
#include "collective/communicator.h"
#include "kernels/backend.h"
#include "model/kv_pages.h"
#include "model/paged_attention.h"
#include "model/pooler.h"
#include "model/prefill_plan.h"
#include "model/transformer.h"

namespace eduba {

// A part of a long append that the ranks of a group share out: every rank takes the rows of its own stripe
// through the model, layer by layer (docs/adr/0007-model-sessions.md, "striped rows"). In each layer all
// ranks first compute the queries, keys and values of their rows. Then they send each other the keys and
// values that their windows need, and those that every rank keeps. Then all attend, with everybody's help
// where a row sees all keys, and compute the rest of the layer. A row has the same bits as in a step that
// every rank computes.
//
// It works on pages of its own, a fork of the context's, so that a prefill that is given up leaves no trace.
// Its work is done in small units, between which other contexts may grow. The ranks of the group make the
// same calls at the same time.
class SequenceParallelPrefill {
 public:
  // All outlive the prefill.
  struct Options {
    Backend* backend = nullptr;
    PageStore* store = nullptr;  // The prefill's buffers count in its budget, as its pages do.
    Transformer* model = nullptr;
    Communicator* communicator = nullptr;
    int64_t chunk_rows = 256;
  };
  struct Rows {
    std::vector<int32_t> ids;  // The token ids of all of the plan's positions.
    std::vector<LayerView> views;
    std::vector<LayerKeeping> keeping;
    std::vector<int64_t> sink_positions;  // RowPositions::sink_positions of this rank's rows.
    std::vector<float> before;   // The hidden state that predicts the first token; empty: there is none.
    bool log_probs = false;      // Wanted.
    std::optional<Pooler> part;  // Takes the hidden states.
  };
  SequenceParallelPrefill(const Options& options, PrefillPlan plan, KvPages pages, Rows rows);

  const PrefillPlan& plan() const { return plan_; }

  // Takes all the memory that the prefill needs: pages, and buffer_bytes() beside them. RESOURCE_EXHAUSTED:
  // this rank has not enough, and took none; no rank may go on then. Any other error is that of its device,
  // and the communicator is dead.
  absl::Status Reserve();

  // The bytes of hidden states and queries of this rank's rows, of messages, and of all else that grows with
  // the prefill.
  int64_t buffer_bytes() const;

  // Goes on by `units` at least: each is a chunk's way through one half of a layer, or as much work. Errors
  // as a Communicator's, which is dead then.
  absl::Status Run(int64_t units, absl::Time deadline);
  // How many of Run's units a chunk of `chunk_rows` rows costs that every rank computes.
  int64_t units_of_a_chunk() const { return 2 * static_cast<int64_t>(rows_.views.size()); }
  bool done() const { return stage_ == Stage::kDone; }

  // Not OK: arithmetic left the finite numbers, INVALID_ARGUMENT. Before the prefill is done, only
  // this rank knows, and still takes part in what the others do; afterwards all ranks know.
  const absl::Status& status() const { return status_; }

  // What came of it, once done() with an OK status(): the pages of a context that ends with the prefill, but
  // for those that no later row sees.
  KvPages TakePages() { return std::move(pages_); }
  const std::vector<float>& last() const { return last_; }            // [hidden_size]
  const std::vector<float>& log_probs() const { return log_probs_; }  // [ids], where wanted; or nothing
  const std::optional<Pooler>& part() const { return rows_.part; }    // With the states of all ranks.

 private:
  enum class Stage : uint8_t { kProject, kExchange, kAttend, kOutputs, kCombine, kDone };
  // Rows of this rank that others need, while a layer runs.
  struct Outgoing {
    PositionRange range;
    StoredRows stored;
  };

  // The most rows that a layer's exchange holds at once.
  int64_t ExchangeRows(int layer) const;
  int rank() const { return options_.communicator->rank(); }
  int ranks() const { return options_.communicator->size(); }
  // The rank's rows of the chunk under way; may be empty.
  PositionRange ChunkOf(int rank) const;
  // Rows of each rank that attend to all keys at a time: half as many as a chunk all together, whose words
  // and partials stay in caches and in the memory of a chunk that every rank computes, but not so few that
  // reading pages takes longest.
  int64_t RoundRows() const;
  int64_t RoundBytes() const;
  // Where the row of this rank's is, for the host.
  float* Hidden(int64_t position) { return hidden_.host() + (position - own_.begin) * width_; }
  const LayerView& view() const { return rows_.views[layer_]; }

  absl::Status RunUnits(int64_t units, absl::Time deadline);
  // Keeps an INVALID_ARGUMENT for later, because the others know nothing of it.
  absl::Status Note(const absl::Status& status);
  void BeginLayer();
  void EndLayer();
  absl::Status Project();
  absl::Status Exchange(absl::Time deadline);
  std::vector<char> Message(int to) const;
  absl::Status TakeIn(int from, absl::Span<const char> message);
  absl::Status AttendWindow(absl::Time deadline);
  absl::Status AttendAll(absl::Time deadline);
  // The queries of everybody's rows of the chunk, in the order of ranks.
  absl::StatusOr<std::vector<float>> GatherQueries(absl::Time deadline) const;
  absl::Status Outputs();
  absl::Status Combine(absl::Time deadline);

  const Options options_;
  const PrefillPlan plan_;
  const PositionRange own_;
  const int64_t width_;      // hidden_size
  const int64_t query_row_;  // Floats of a row's queries.
  ReservedBytes buffers_;
  KvPages pages_;
  Rows rows_;
  std::vector<PrefillPages> layer_pages_;  // [layers]
  KvPages::SparePages spare_;
  RowAngles angles_;                           // The angles of this rank's rows.
  LayerFloats hidden_;                         // [own rows, hidden_size]
  std::vector<float> queries_, sink_queries_;  // [own rows, query_heads, head_dim] of the layer
  std::vector<Outgoing> outgoing_;
  std::vector<int64_t>
      log_prob_words_;  // [ids]: bits of floats, of the tokens that this rank's rows predict.
  std::vector<float> last_, log_probs_;

  Stage stage_ = Stage::kProject;
  int layer_ = 0;
  int64_t chunk_ = 0;
  int64_t chunks_ = 0;  // The chunks of the rank that has most.
  absl::Status status_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_SEQUENCE_PARALLEL_PREFILL_H_
