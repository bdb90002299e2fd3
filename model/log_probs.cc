#include "model/log_probs.h"

#include <algorithm>

#include "base/check.h"
#include "base/status_macros.h"
#include "model/sampler.h"

namespace eduba {
namespace {

// Rows whose logits are held at once.
constexpr int64_t kLogitRows = Transformer::kReservedLogitRows;

}  // namespace

absl::StatusOr<std::vector<float>> LogProbs(Transformer& model, absl::Span<const float> hidden,
                                            absl::Span<const int32_t> ids) {
  const int64_t width = model.config().hidden_size;
  const int64_t vocab = model.config().vocab_size;
  const auto rows = static_cast<int64_t>(ids.size());
  EDUBA_CHECK_EQ(static_cast<int64_t>(hidden.size()), rows * width);
  std::vector<float> log_probs;
  for (int64_t row = 0; row < rows; row += kLogitRows) {
    const int64_t some = std::min(kLogitRows, rows - row);
    EDUBA_ASSIGN_OR_RETURN(const absl::Span<const float> logits, model.Logits(&hidden[row * width], some));
    for (int64_t i = 0; i < some; ++i) {
      log_probs.push_back(LogProb(logits.subspan(i * vocab, vocab), ids[row + i]));
    }
  }
  return log_probs;
}

}  // namespace eduba
