#include "model/pooler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace eduba {

absl::StatusOr<Pooler> Pooler::Create(std::vector<PositionRange> ranges, Pool pool, int64_t dim) {
  int64_t before = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const PositionRange& range = ranges[i];
    if (range.empty() || range.begin < before) {
      return absl::InvalidArgumentError(absl::StrCat("range ", i, " is [", range.begin, ", ", range.end,
                                                     "), wanted at least one position from ", before,
                                                     " on; ranges ascend and do not overlap"));
    }
    before = range.end;
  }
  return Pooler(std::move(ranges), pool, dim);
}

void Pooler::Add(int64_t first, int64_t rows, const float* hidden) {
  for (int64_t position = first; position < first + rows; ++position, hidden += dim_) {
    while (next_ < ranges_.size() && ranges_[next_].end <= position) ++next_;
    if (next_ == ranges_.size()) return;
    if (position < ranges_[next_].begin) continue;
    double* sum = &sums_[next_ * dim_];
    ++seen_[next_];
    if (pool_ == Pool::kMean) {
      for (int64_t c = 0; c < dim_; ++c) sum[c] += hidden[c];
    } else if (position + 1 == ranges_[next_].end) {
      std::copy_n(hidden, dim_, sum);
    }
  }
}

absl::StatusOr<std::vector<float>> Pooler::Finish() const {
  std::vector<float> pooled(sums_.size());
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const PositionRange& range = ranges_[i];
    if (seen_[i] != range.size()) {
      return absl::FailedPreconditionError(absl::StrCat("range ", i, " is [", range.begin, ", ", range.end,
                                                        "), but ", seen_[i], " of its positions came by"));
    }
    const double divisor = pool_ == Pool::kMean ? static_cast<double>(range.size()) : 1;
    for (int64_t c = 0; c < dim_; ++c) {
      pooled[i * dim_ + c] = static_cast<float>(sums_[i * dim_ + c] / divisor);
    }
  }
  return pooled;
}

}  // namespace eduba
