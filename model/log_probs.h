#ifndef EDUBA_MODEL_LOG_PROBS_H_
#define EDUBA_MODEL_LOG_PROBS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/transformer.h"

namespace eduba {

// ln of the probabilities of tokens `ids`, each given everything before it: hidden [ids, hidden_size] are the
// hidden states of the tokens before them. Each is a function of its own row. INVALID_ARGUMENT where a logit
// is not finite.
absl::StatusOr<std::vector<float>> LogProbs(Transformer& model, absl::Span<const float> hidden,
                                            absl::Span<const int32_t> ids);

}  // namespace eduba

#endif  // EDUBA_MODEL_LOG_PROBS_H_
