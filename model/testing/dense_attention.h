#ifndef EDUBA_MODEL_TESTING_DENSE_ATTENTION_H_
#define EDUBA_MODEL_TESTING_DENSE_ATTENTION_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "model/config.h"
#include "model/layer_attention.h"

namespace eduba::testing {

// Attention by its definition, in double: every key is kept, a predicate says which a row sees, and a
// function at which rotary positions the two meet. Rotations that came with a row are undone first, so a mode
// of positions is checked against what it means, not against how it is computed.
class DenseAttention final : public LayerAttention {
 public:
  struct Meeting {
    double query = 0;  // Rotary position of the query ...
    double key = 0;    // ... and of the key.
  };
  // sees(layer, i, j): whether position i sees position j <= i. meets(i, j): where.
  DenseAttention(const ModelConfig& config, std::function<bool(int, int64_t, int64_t)> sees,
                 std::function<Meeting(int64_t, int64_t)> meets);

  absl::Status Attend(const LayerRows& rows, float* outputs) override;

 private:
  std::vector<double> Turned(int layer, const std::vector<double>& vector, double positions) const;

  const ModelConfig config_;
  const std::function<bool(int, int64_t, int64_t)> sees_;
  const std::function<Meeting(int64_t, int64_t)> meets_;
  std::vector<std::vector<double>> frequencies_;  // [layers]
  // [layers][positions * kv_heads][head_dim], keys at rotary position 0.
  std::vector<std::vector<std::vector<double>>> keys_, values_;
};

}  // namespace eduba::testing

#endif  // EDUBA_MODEL_TESTING_DENSE_ATTENTION_H_
