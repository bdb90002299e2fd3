#ifndef EDUBA_KERNELS_REFERENCE_ATTENTION_H_
#define EDUBA_KERNELS_REFERENCE_ATTENTION_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace eduba {

// Attention over dense arrays, by its definition (docs/numerics.md section 1), in double, without pages,
// partials or merges: the judge of every backend and of everything built on one.
struct DenseAttention {
  int rows = 0;
  int query_heads = 1;
  int kv_heads = 1;
  int head_dim = 1;
  int value_dim = 1;
  double scale = 1;
  double softcap = 0;              // 0: none
  std::vector<float> queries;      // [rows, query_heads, head_dim]
  std::vector<float> keys;         // [positions, kv_heads, head_dim], as stored (already rounded)
  std::vector<float> values;       // [positions, kv_heads, value_dim]
  std::vector<float> sink_logits;  // Learned sinks: empty, or [query_heads]
  int sink_tokens = 0;             // Positions below this count as sinks in the sink mass.
  std::function<bool(int row, int64_t position)> sees;
};

struct DenseResult {
  std::vector<double> outputs;    // [rows, query_heads, value_dim]
  std::vector<double> lse;        // [rows, query_heads]; -inf where nothing is seen
  std::vector<double> sink_mass;  // [rows, query_heads]
};

// Reads only keys and values that `sees` admits.
DenseResult ReferenceAttention(const DenseAttention& problem);

}  // namespace eduba

#endif  // EDUBA_KERNELS_REFERENCE_ATTENTION_H_
