#include "model/pooler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

absl::Status Pooler::CheckRanges(absl::Span<const PositionRange> ranges) {
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
  return absl::OkStatus();
}

absl::StatusOr<Pooler> Pooler::Create(std::vector<PositionRange> ranges, Pool pool,
                                      absl::Span<const int16_t> exponents) {
  EDUBA_RETURN_IF_ERROR(CheckRanges(ranges));
  return Pooler(std::move(ranges), pool, exponents);
}

// So many terms of at most 2^e, in units of 2^(e - bits), stay below 2^62 together.
int Pooler::FractionBits(const PositionRange& range) {
  return 62 - std::bit_width(static_cast<uint64_t>(range.size() - 1));
}

void Pooler::Add(int64_t first, int64_t rows, const float* hidden) {
  for (int64_t position = first; position < first + rows; ++position, hidden += dim()) {
    while (next_ < ranges_.size() && ranges_[next_].end <= position) ++next_;
    if (next_ == ranges_.size()) return;
    const PositionRange& range = ranges_[next_];
    if (position < range.begin) continue;
    int64_t* words = &words_[next_ * (dim() + 1)];
    ++words[dim()];
    if (pool_ == Pool::kMean) {
      const int bits = FractionBits(range);
      for (int64_t c = 0; c < dim(); ++c) {
        words[c] += std::llrint(std::ldexp(static_cast<double>(hidden[c]), bits - exponents_[c]));
      }
    } else if (position + 1 == range.end) {
      for (int64_t c = 0; c < dim(); ++c) words[c] = std::bit_cast<uint32_t>(hidden[c]);
    }
  }
}

Pooler Pooler::Part(PositionRange range) const {
  std::vector<PositionRange> ranges;
  size_t offset = 0;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    if (ranges_[i].Intersect(range).empty()) continue;
    if (ranges.empty()) offset = i;
    ranges.push_back(ranges_[i]);
  }
  Pooler part(std::move(ranges), pool_, exponents_);
  part.offset_ = offset;
  return part;
}

void Pooler::AddPart(const Pooler& part) {
  EDUBA_CHECK(part.words_.empty() || part.offset_ * (dim() + 1) + part.words_.size() <= words_.size());
  for (size_t i = 0; i < part.words_.size(); ++i) words_[part.offset_ * (dim() + 1) + i] += part.words_[i];
}

absl::StatusOr<std::vector<float>> Pooler::Finish() const {
  std::vector<float> pooled;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const PositionRange& range = ranges_[i];
    const int64_t* words = &words_[i * (dim() + 1)];
    if (words[dim()] != range.size()) {
      return absl::FailedPreconditionError(absl::StrCat("range ", i, " is [", range.begin, ", ", range.end,
                                                        "), but ", words[dim()],
                                                        " of its positions came by"));
    }
    const int bits = FractionBits(range);
    for (int64_t c = 0; c < dim(); ++c) {
      pooled.push_back(pool_ == Pool::kLast ? std::bit_cast<float>(static_cast<uint32_t>(words[c]))
                                            : static_cast<float>(std::ldexp(static_cast<double>(words[c]),
                                                                            exponents_[c] - bits) /
                                                                 static_cast<double>(range.size())));
    }
  }
  return pooled;
}

}  // namespace eduba
