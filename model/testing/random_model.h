#ifndef EDUBA_MODEL_TESTING_RANDOM_MODEL_H_
#define EDUBA_MODEL_TESTING_RANDOM_MODEL_H_

#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/weights.h"

namespace eduba::testing {

// A small model with every part that a family may have, drawn from a seed: two equal seeds make the same
// numbers. Weights are of a size that keeps logits and attention from being flat.
class RandomModel {
 public:
  explicit RandomModel(uint64_t seed);
  // The same numbers for a configuration of the caller's.
  RandomModel(const ModelConfig& config, DType dtype, uint64_t seed);

  // What a seed draws: norms, windows, heads, rotary parts, biases, softcaps.
  static ModelConfig RandomConfig(uint64_t seed);

  std::string ToString() const;

  ModelConfig config;
  DType dtype = DType::kF32;
  ModelWeights weights;  // Into this object.

 private:
  WeightView Tensor(std::vector<int64_t> shape, float center, float size);
  NormWeights Norm(int64_t channels, bool bias);
  LinearWeights Linear(int64_t out, int64_t in, bool bias);

  uint64_t seed_;
  std::mt19937_64 random_;
  std::deque<std::vector<char>> memory_;
};

}  // namespace eduba::testing

#endif  // EDUBA_MODEL_TESTING_RANDOM_MODEL_H_
