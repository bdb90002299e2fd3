#include "kernels/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace eduba {

DenseResult ReferenceAttention(const DenseAttention& a) {
  const size_t row_heads = static_cast<size_t>(a.rows) * a.query_heads;
  const auto positions = static_cast<int64_t>(a.keys.size() / (static_cast<size_t>(a.kv_heads) * a.head_dim));
  const double infinity = std::numeric_limits<double>::infinity();
  DenseResult result{std::vector<double>(row_heads * a.value_dim), std::vector<double>(row_heads, -infinity),
                     std::vector<double>(row_heads)};
  std::vector<double> logits(positions);

  for (int row = 0; row < a.rows; ++row) {
    for (int head = 0; head < a.query_heads; ++head) {
      const size_t out = static_cast<size_t>(row) * a.query_heads + head;
      const int kv_head = head / (a.query_heads / a.kv_heads);

      double largest = a.sink_logits.empty() ? -infinity : a.sink_logits[head];
      for (int64_t j = 0; j < positions; ++j) {
        if (!a.sees(row, j)) continue;
        double dot = 0;
        for (int d = 0; d < a.head_dim; ++d) {
          dot += static_cast<double>(a.queries[out * a.head_dim + d]) *
                 a.keys[(j * a.kv_heads + kv_head) * a.head_dim + d];
        }
        logits[j] = a.softcap > 0 ? a.softcap * std::tanh(a.scale * dot / a.softcap) : a.scale * dot;
        largest = std::max(largest, logits[j]);
      }
      if (largest == -infinity) continue;

      double sinks = a.sink_logits.empty() ? 0 : std::exp(a.sink_logits[head] - largest);
      double total = sinks;
      std::vector<double> sum(a.value_dim);
      for (int64_t j = 0; j < positions; ++j) {
        if (!a.sees(row, j)) continue;
        const double weight = std::exp(logits[j] - largest);
        total += weight;
        if (j < a.sink_tokens) sinks += weight;
        for (int c = 0; c < a.value_dim; ++c) {
          sum[c] += weight * a.values[(j * a.kv_heads + kv_head) * a.value_dim + c];
        }
      }
      for (int c = 0; c < a.value_dim; ++c) result.outputs[out * a.value_dim + c] = sum[c] / total;
      result.lse[out] = largest + std::log(total);
      result.sink_mass[out] = sinks / total;
    }
  }
  return result;
}

}  // namespace eduba
