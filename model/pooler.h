#ifndef EDUBA_MODEL_POOLER_H_
#define EDUBA_MODEL_POOLER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/pages.h"

namespace eduba {

enum class Pool : uint8_t { kMean, kLast };

// One vector for each range of positions, from hidden states that come by in ascending positions, in any
// number of pieces: sums are double and in order of position, so the pieces do not change a bit.
class Pooler {
 public:
  // Ranges ascend and do not overlap: INVALID_ARGUMENT names the first that is empty,
  // negative, or begins before its predecessor's end.
  static absl::StatusOr<Pooler> Create(std::vector<PositionRange> ranges, Pool pool, int64_t dim);

  // Hidden states [rows, dim] of positions from `first` on. REQUIRES: none came before.
  void Add(int64_t first, int64_t rows, const float* hidden);
  // [ranges, dim]. FAILED_PRECONDITION names the first range of which a position did not come.
  absl::StatusOr<std::vector<float>> Finish() const;

 private:
  Pooler(std::vector<PositionRange> ranges, Pool pool, int64_t dim)
      : ranges_(std::move(ranges)),
        pool_(pool),
        dim_(dim),
        seen_(ranges_.size()),
        sums_(ranges_.size() * dim) {}

  std::vector<PositionRange> ranges_;
  Pool pool_;
  int64_t dim_;
  size_t next_ = 0;            // The first range that is not behind us.
  std::vector<int64_t> seen_;  // Positions of each range.
  std::vector<double> sums_;   // [ranges, dim]
};

}  // namespace eduba

#endif  // EDUBA_MODEL_POOLER_H_
