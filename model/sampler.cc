#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/log_sum.h"
#include "kernels/portable_math.h"

namespace eduba {
namespace {

// In [0, 1), a hash of its arguments (Steele et al., "Fast splittable pseudorandom number generators", 2014).
double Uniform(uint64_t seed, int64_t position) {
  uint64_t z = seed + 0x9e3779b97f4a7c15U * (static_cast<uint64_t>(position) + 1);
  for (int round = 0; round < 2; ++round) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    z ^= z >> 31;
  }
  return static_cast<double>(z >> 11) * 0x1p-53;
}

}  // namespace

absl::Status CheckSampling(const SamplingOptions& options) {
  if (!(options.temperature >= 0 && options.temperature <= 1e6F)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature is ", options.temperature, ", wanted 0 (greedy) or a positive number"));
  }
  if (options.top_k < 0) {
    return absl::InvalidArgumentError(absl::StrCat("top_k is ", options.top_k, ", wanted 0 (all) or more"));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p is ", options.top_p, ", wanted more than 0 and at most 1"));
  }
  return absl::OkStatus();
}

float LogProb(absl::Span<const float> logits, int32_t id) {
  return static_cast<float>(logits[id] - LogSumExp(logits));
}

TokenChoice ChooseToken(absl::Span<const float> logits, const SamplingOptions& options, int64_t position) {
  const auto choice = [&](int32_t id) { return TokenChoice{id, LogProb(logits, id)}; };
  if (options.temperature == 0) {
    return choice(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  std::vector<int32_t> ids(logits.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  // Where two logits are equal the smaller id comes first.
  const auto likelier = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(ids.size())) {
    std::nth_element(ids.begin(), ids.begin() + options.top_k, ids.end(), likelier);
    ids.resize(options.top_k);
    std::sort(ids.begin(), ids.end());
  }
  const double largest = logits[*std::min_element(ids.begin(), ids.end(), likelier)];
  std::vector<double> weights;  // [ids]
  double mass = 0;
  for (const int32_t id : ids) {
    weights.push_back(PortableExp((logits[id] - largest) / options.temperature));
    mass += weights.back();
  }
  if (options.top_p < 1) {
    // The likeliest come off a heap, so that no time is spent on the order of the others.
    const double wanted = options.top_p * mass;
    std::vector<int32_t> heap(ids.size());  // Indices of ids.
    for (size_t i = 0; i < heap.size(); ++i) heap[i] = static_cast<int32_t>(i);
    const auto less = [&](int32_t a, int32_t b) { return likelier(ids[b], ids[a]); };
    std::make_heap(heap.begin(), heap.end(), less);
    std::vector<int32_t> kept;
    std::vector<double> kept_weights;
    mass = 0;
    while (!heap.empty() && (kept.empty() || mass < wanted)) {
      std::pop_heap(heap.begin(), heap.end(), less);
      kept.push_back(ids[heap.back()]);
      kept_weights.push_back(weights[heap.back()]);
      mass += kept_weights.back();
      heap.pop_back();
    }
    ids = std::move(kept);
    weights = std::move(kept_weights);
  }
  double left = Uniform(options.seed, position) * mass;
  size_t last = 0;  // The last one that can be drawn: rounding may leave a little of `left` after it.
  for (size_t i = 0; i < ids.size() && left >= 0; ++i) {
    if (weights[i] > 0) last = i;
    left -= weights[i];
  }
  return choice(ids[last]);
}

}  // namespace eduba
