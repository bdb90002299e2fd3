#ifndef EDUBA_MODEL_LAYER_ATTENTION_H_
#define EDUBA_MODEL_LAYER_ATTENTION_H_

#include <cstdint>

#include "absl/status/status.h"

namespace eduba {

// The rows of one step as one layer sees them: rotated, normed, not yet attended.
struct LayerRows {
  int layer = 0;
  int64_t rows = 0;
  const float* queries = nullptr;  // [rows, query_heads, head_dim]
  // The same for the token sinks, where a row's are turned to another position; else `queries`.
  const float* sink_queries = nullptr;
  const float* keys = nullptr;    // [rows, kv_heads, head_dim]
  const float* values = nullptr;  // [rows, kv_heads, head_dim]
};

// What a transformer does not know: where keys and values live, who sees which, and how many workers hold
// them.
class LayerAttention {
 public:
  virtual ~LayerAttention() = default;

  // Takes in the rows' keys and values, and writes what the rows' queries then see: outputs [rows,
  // query_heads, head_dim]. Layers come in ascending order, each once a step. An error ends the step.
  virtual absl::Status Attend(const LayerRows& rows, float* outputs) = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_LAYER_ATTENTION_H_
