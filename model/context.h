#ifndef EDUBA_MODEL_CONTEXT_H_
#define EDUBA_MODEL_CONTEXT_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/placement.h"
#include "model/config.h"
#include "model/kv_pages.h"
#include "model/paged_attention.h"
#include "model/prefill_plan.h"

namespace eduba {

enum class ContextPolicy : uint8_t {
  kModel,      // The model's own layers: windows where its configuration has them, all keys elsewhere.
  kStreaming,  // Every layer sees token sinks and a window (StreamingLLM, Xiao et al., 2023): constant
               // memory.
  // Appended rows see what they see with kStreaming; a row that is asked or generated sees all keys.
  kStar,
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

  bool operator==(const ContextOptions&) const = default;
};

// The rotary index that a row's query has where it scores the token sinks.
int64_t SinkPosition(const ContextOptions& options, int64_t position);

// A sequence of tokens as a model has read it: the keys and values that one node keeps of it, and the hidden
// state of its last token. It belongs to no group: whoever makes a step says with whom. ModelEngine makes and
// changes contexts, and outlives them.
class Context {
 public:
  // The same content. Both share their pages until one of them changes.
  Context Fork() const { return *this; }

  const ContextOptions& options() const { return options_; }
  const Placement& placement() const { return pages_.placement(); }
  int64_t length() const { return length_; }
  // [hidden_size]: the hidden state of the last token; empty at the beginning.
  absl::Span<const float> last() const { return last_; }
  // No row, appended or asked, sees more of any layer than token sinks and a window. Every rank keeps those,
  // so that one rank can compute such rows alone.
  bool every_layer_sees_a_window() const;
  // Bytes of the pages that this node holds; what forks share counts for each.
  int64_t page_bytes() const { return pages_.bytes(); }
  // Gives back all pages: the context is empty, as it was at first.
  void Clear();

 private:
  friend class ModelEngine;
  Context(const ContextOptions& options, KvPages pages) : options_(options), pages_(std::move(pages)) {}

  ContextOptions options_;
  KvPages pages_;
  std::vector<LayerView> append_views_, ask_views_;  // [layers]
  std::vector<LayerKeeping> keeping_;                // [layers]: what later rows may see.
  int64_t length_ = 0;
  std::vector<float> last_;  // [hidden_size] of the last token; empty at the beginning.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_CONTEXT_H_
