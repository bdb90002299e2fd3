#ifndef EDUBA_MODEL_POOLER_H_
#define EDUBA_MODEL_POOLER_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/pages.h"

namespace eduba {

enum class Pool : uint8_t { kMean, kLast };

// One vector for each range of positions, from hidden states that come by in ascending positions. Means are
// sums of int64 in units that follow from the model and the length of the range, so neither the pieces in
// which the states come nor how ranks share them change a bit. (A unit is at most 2^-32 of what a state's
// channel can be, for the longest range, 2^-52 for one of a thousand: below what fp32 tells apart.)
class Pooler {
 public:
  // Ranges ascend and do not overlap: INVALID_ARGUMENT names the first that is empty,
  // negative, or begins before its predecessor's end.
  static absl::Status CheckRanges(absl::Span<const PositionRange> ranges);

  // INVALID_ARGUMENT as CheckRanges.
  // `exponents` [dim]: |hidden[., c]| <= 2^e[c] (Transformer::hidden_exponents).
  static absl::StatusOr<Pooler> Create(std::vector<PositionRange> ranges, Pool pool,
                                       absl::Span<const int16_t> exponents);

  // Hidden states [rows, dim] of positions from `first` on. REQUIRES: they are finite, and none came before.
  void Add(int64_t first, int64_t rows, const float* hidden);

  // For positions of `range` that ranks share: a pooler of what the ranges have there, with nothing in it.
  Pooler Part(PositionRange range) const;
  // The bytes of memory that it takes, its answer not counted.
  int64_t bytes() const { return static_cast<int64_t>(words_.size() * sizeof(int64_t)); }
  // [ranges, dim + 1]: what it has seen. Summed over the ranks' parts they are those of one part that saw
  // all.
  absl::Span<int64_t> words() { return absl::MakeSpan(words_); }
  // Takes in what a part of this pooler has seen, as Add would have: positions before it may not come any
  // more.
  void AddPart(const Pooler& part);

  // [ranges, dim]. FAILED_PRECONDITION names the first range of which a position did not come.
  absl::StatusOr<std::vector<float>> Finish() const;

 private:
  Pooler(std::vector<PositionRange> ranges, Pool pool, absl::Span<const int16_t> exponents)
      : ranges_(std::move(ranges)),
        pool_(pool),
        exponents_(exponents.begin(), exponents.end()),
        words_(ranges_.size() * (exponents.size() + 1)) {}
  int64_t dim() const { return static_cast<int64_t>(exponents_.size()); }
  // The range's unit in channel c is 2^-(fraction bits - e[c]).
  static int FractionBits(const PositionRange& range);

  std::vector<PositionRange> ranges_;  // Whole, also in a part.
  Pool pool_;
  std::vector<int16_t> exponents_;
  size_t offset_ = 0;  // In a part: its first range among those it is a part of.
  size_t next_ = 0;    // The first range that has not been passed yet.
  // kMean: sums; kLast: the last state's floats as they are. Then how many positions came.
  std::vector<int64_t> words_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_POOLER_H_
