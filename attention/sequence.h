#ifndef EDUBA_ATTENTION_SEQUENCE_H_
#define EDUBA_ATTENTION_SEQUENCE_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "attention/page_table.h"
#include "base/digest.h"
#include "kernels/backend.h"

namespace eduba {

// What never changes about a sequence.
struct SequenceSpec {
  AttentionShape shape;
  int layers = 1;
  int64_t sink_tokens = 0;         // The first positions, on every worker.
  int64_t window = 0;              // Positions a window query sees; 0: it may not ask.
  std::vector<float> sink_logits;  // Learned sinks: empty, or [query_heads].

  // Elements of an exponent array over all layers, and of one layer's.
  int64_t exponents_per_layer() const { return int64_t{shape.kv_heads} * shape.value_dim; }
  int64_t exponents() const { return layers * exponents_per_layer(); }
};

// The exponent of a channel whose values are all zero: 0 <= 2^e for every e, and the largest wins.
inline constexpr int16_t kNoExponent = INT16_MIN;

// The pages of one layer of a sequence on one worker.
struct SequenceLayer {
  PageTable owned;
  PageTable sinks;  // The worker's own copy of the token sinks; every worker has one, owners included.
};

// What one worker holds of one tensor session. StagedAppend brings it new pages, the continued last page
// among them as a copy, so a page that a query may read never changes. One thread at a time.
class Sequence {
 public:
  explicit Sequence(SequenceSpec spec);

  const SequenceSpec& spec() const { return spec_; }
  // Committed positions of the whole sequence, not only of this worker's pages.
  int64_t length() const { return length_; }
  const PageTable& pages(int layer) const { return layers_[layer].owned; }
  const PageTable& sink_pages(int layer) const { return layers_[layer].sinks; }
  // [kv_heads, value_dim], agreed by all workers: |v[., c]| <= 2^e[c] over the rows below `length`, a length
  // that was committed once. A query is asked with the length of its time, so an append that is committed
  // before it runs does not change its bits.
  absl::Span<const int16_t> exponents(int layer, int64_t length) const;
  // [layers, kv_heads, value_dim]: the same over the rows that this worker owns; kNoExponent where all are
  // zero.
  const std::vector<int16_t>& owned_exponents() const { return owned_exponents_; }
  // The digest of the committed rows that this worker owns, of all layers: the sum of what the seals of its
  // appends said.
  Digest digest() const;

  // Commits an append: its pages [layers], the new length, and both kinds of exponents as they are with it.
  void Extend(const std::vector<SequenceLayer>& pages, int64_t length, std::vector<int16_t> exponents,
              std::vector<int16_t> owned_exponents);

 private:
  // In force from `length` on. One more only when an append brings a larger value, so there are few.
  struct Exponents {
    int64_t length;
    std::vector<int16_t> values;
  };

  const SequenceSpec spec_;
  int64_t length_ = 0;
  std::vector<SequenceLayer> layers_;
  std::vector<Exponents> exponents_;
  std::vector<int16_t> owned_exponents_;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_SEQUENCE_H_
