#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/portable_exp.h"

namespace eduba {
namespace {

// ln(sum exp(logits)), in double, ids in order.
double LogSum(absl::Span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += PortableExp(logit - largest);
  return largest + std::log(sum);
}

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
  return static_cast<float>(logits[id] - LogSum(logits));
}

TokenChoice ChooseToken(absl::Span<const float> logits, const SamplingOptions& options, int64_t position) {
  const auto choice = [&](int32_t id) { return TokenChoice{id, LogProb(logits, id)}; };
  if (options.temperature == 0) {
    return choice(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  // Likeliest first; of equals the smaller id.
  std::vector<int32_t> ids(logits.size());
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  const auto likelier = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  const bool cut = options.top_k > 0 && options.top_k < static_cast<int64_t>(ids.size());
  if (cut) {
    std::nth_element(ids.begin(), ids.begin() + options.top_k, ids.end(), likelier);
    ids.resize(options.top_k);
  }
  std::sort(ids.begin(), ids.end(), likelier);

  std::vector<double> weights;
  double total = 0;
  for (const int32_t id : ids) {
    weights.push_back(PortableExp((static_cast<double>(logits[id]) - logits[ids[0]]) / options.temperature));
    total += weights.back();
  }
  size_t kept = 0;
  double mass = 0;
  while (kept < ids.size() && (kept == 0 || mass < options.top_p * total)) mass += weights[kept++];

  double left = Uniform(options.seed, position) * mass;
  for (size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) return choice(ids[i]);
  }
  return choice(ids[kept - 1]);
}

}  // namespace eduba
