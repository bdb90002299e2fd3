#ifndef EDUBA_MODEL_SAMPLER_H_
#define EDUBA_MODEL_SAMPLER_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace eduba {

struct SamplingOptions {
  float temperature = 0;  // 0: the likeliest token, of equals the one with the smallest id.
  int64_t top_k = 0;      // Only the k likeliest; 0: all.
  float top_p = 1;        // Only the likeliest that together reach this probability (the last included).
  uint64_t seed = 0;
};

// INVALID_ARGUMENT naming the option that is out of range.
absl::Status CheckSampling(const SamplingOptions& options);

struct TokenChoice {
  int32_t id = 0;
  float log_prob = 0;  // Natural, of the untempered distribution over the whole vocabulary.
};

// Chooses the token that follows `position` - 1 positions. Chance comes from (seed, position) alone, so it
// does not matter in how many calls a text was generated, or beside which others. REQUIRES: logits are finite
// and not empty; options are OK.
TokenChoice ChooseToken(absl::Span<const float> logits, const SamplingOptions& options, int64_t position);

// ln of the probability of `id`.
float LogProb(absl::Span<const float> logits, int32_t id);

}  // namespace eduba

#endif  // EDUBA_MODEL_SAMPLER_H_
