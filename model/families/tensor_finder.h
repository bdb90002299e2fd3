#ifndef EDUBA_MODEL_FAMILIES_TENSOR_FINDER_H_
#define EDUBA_MODEL_FAMILIES_TENSOR_FINDER_H_

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "model/config.h"
#include "model/safetensors.h"
#include "model/weights.h"

namespace eduba {

// Takes tensors by name and remembers which, so that Finish() can refuse those that nothing used. The first
// error sticks; views taken after it are absent.
class TensorFinder {
 public:
  explicit TensorFinder(const Safetensors& tensors) : tensors_(tensors) {}

  WeightView Take(const std::string& name, const std::vector<int64_t>& shape);
  // name.weight [channels], and name.bias.
  NormWeights Norm(const std::string& name, int64_t channels, bool bias);
  // name.weight [out, in], and name.bias [out].
  LinearWeights Linear(const std::string& name, int64_t out, int64_t in, bool bias);
  // The output matrix under one of its names. Tied: the embeddings, whose copy, if there is one, must be the
  // same.
  WeightView Head(std::initializer_list<const char*> names, const WeightView& embeddings,
                  const ModelConfig& config);
  // A tensor that may be there and is not used.
  void Skip(const std::string& name) { used_.insert(name); }

  // The first error, or kInvalidArgument naming a tensor that was neither taken nor skipped.
  absl::Status Finish();

 private:
  const Safetensors& tensors_;
  std::set<std::string> used_;
  absl::Status status_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_FAMILIES_TENSOR_FINDER_H_
