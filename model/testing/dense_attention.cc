#include "model/testing/dense_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "model/rope.h"

namespace eduba::testing {

DenseAttention::DenseAttention(const ModelConfig& config, std::function<bool(int, int64_t, int64_t)> sees,
                               std::function<Meeting(int64_t, int64_t)> meets)
    : config_(config),
      sees_(std::move(sees)),
      meets_(std::move(meets)),
      keys_(config.layers.size()),
      values_(config.layers.size()) {
  for (const LayerConfig& layer : config.layers) frequencies_.push_back(InverseFrequencies(layer.rope));
}

std::vector<double> DenseAttention::Turned(int layer, const std::vector<double>& vector,
                                           double positions) const {
  const std::vector<double>& frequencies = frequencies_[layer];
  const auto half = static_cast<int>(frequencies.size());
  std::vector<double> turned = vector;
  for (int i = 0; i < half; ++i) {
    const double c = std::cos(positions * frequencies[i]);
    const double s = std::sin(positions * frequencies[i]);
    turned[i] = vector[i] * c - vector[half + i] * s;
    turned[half + i] = vector[half + i] * c + vector[i] * s;
  }
  return turned;
}

absl::Status DenseAttention::Attend(const LayerRows& rows, float* outputs) {
  const int dim = config_.head_dim;
  auto& keys = keys_[rows.layer];
  auto& values = values_[rows.layer];
  const auto first = static_cast<int64_t>(keys.size()) / config_.kv_heads;
  const auto vector = [&](const float* from, int64_t index) {
    return std::vector<double>(from + index * dim, from + (index + 1) * dim);
  };
  for (int64_t row = 0; row < rows.rows; ++row) {
    for (int head = 0; head < config_.kv_heads; ++head) {
      const int64_t index = row * config_.kv_heads + head;
      keys.push_back(Turned(rows.layer, vector(rows.keys, index), -static_cast<double>(first + row)));
      values.push_back(vector(rows.values, index));
    }
  }
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t i = first + row;
    for (int head = 0; head < config_.query_heads; ++head) {
      const int64_t out = row * config_.query_heads + head;
      const int kv_head = head / (config_.query_heads / config_.kv_heads);
      const std::vector<double> query =
          Turned(rows.layer, vector(rows.queries, out), -static_cast<double>(i));
      std::vector<std::pair<double, int64_t>> logits;
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j <= i; ++j) {
        if (!sees_(rows.layer, i, j)) continue;
        // Only the distance of the two matters.
        const Meeting at = meets_(i, j);
        const std::vector<double> turned = Turned(rows.layer, query, at.query - at.key);
        const std::vector<double>& key = keys[j * config_.kv_heads + kv_head];
        double dot = 0;
        for (int c = 0; c < dim; ++c) dot += turned[c] * key[c];
        double logit = config_.attention_scale * dot;
        if (config_.attention_softcap > 0) {
          logit = config_.attention_softcap * std::tanh(logit / config_.attention_softcap);
        }
        largest = std::max(largest, logit);
        logits.emplace_back(logit, j);
      }
      std::vector<double> sum(dim);
      double total = 0;
      for (const auto& [logit, j] : logits) {
        const double weight = std::exp(logit - largest);
        total += weight;
        for (int c = 0; c < dim; ++c) sum[c] += weight * values[j * config_.kv_heads + kv_head][c];
      }
      for (int c = 0; c < dim; ++c) outputs[out * dim + c] = static_cast<float>(sum[c] / total);
    }
  }
  return absl::OkStatus();
}

}  // namespace eduba::testing
