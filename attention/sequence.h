#ifndef EDUBA_ATTENTION_SEQUENCE_H_
#define EDUBA_ATTENTION_SEQUENCE_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "attention/page_store.h"
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

// Pages of one layer in ascending order of their absolute index.
class PageTable {
 public:
  // Takes the page's place, or the next one. REQUIRES: `index` >= the last page's.
  void Put(int64_t index, Page page);
  // The last page's memory if that page is `index`, else null: only the tail is ever continued.
  const void* Tail(int64_t index) const;
  absl::Span<const PageRef> refs() const { return refs_; }

 private:
  std::vector<Page> pages_;
  std::vector<PageRef> refs_;
};

// What one worker holds of one sequence: per layer the pages that it owns and its own copy of the token
// sinks' pages (replicated on every worker, owners included). Pages never change once they are here: an
// append brings new ones, the continued tail page among them as a copy. One thread at a time.
class Sequence {
 public:
  explicit Sequence(SequenceSpec spec);

  const SequenceSpec& spec() const { return spec_; }
  // Committed positions of the whole sequence, not only of this worker's pages.
  int64_t length() const { return length_; }
  const PageTable& pages(int layer) const { return layers_[layer].owned; }
  const PageTable& sink_pages(int layer) const { return layers_[layer].sinks; }
  // [kv_heads, value_dim], agreed by all workers: |v[., c]| <= 2^e[c] over the rows below `length`, a length
  // that was committed once. So a query that was asked before an append has the same bits whether it runs
  // before or after.
  absl::Span<const int16_t> exponents(int layer, int64_t length) const;
  // [layers, kv_heads, value_dim]: the same over the rows that this worker owns; kNoExponent where all are
  // zero.
  const std::vector<int16_t>& owned_exponents() const { return owned_exponents_; }
  // Of the rows that this worker owns, all of them committed: the sum of what its appends' seals said.
  const Digest& digest() const { return digest_; }

  // A committed append. Pages are put in first, the length comes last.
  void PutOwned(int layer, int64_t index, Page page) { layers_[layer].owned.Put(index, std::move(page)); }
  void PutSink(int layer, int64_t index, Page page) { layers_[layer].sinks.Put(index, std::move(page)); }
  void Extend(int64_t length, std::vector<int16_t> exponents, std::vector<int16_t> owned_exponents,
              const Digest& appended);

 private:
  struct Layer {
    PageTable owned;
    PageTable sinks;
  };

  const SequenceSpec spec_;
  int64_t length_ = 0;
  std::vector<Layer> layers_;
  // In force from `length` on. One more only when an append brings a larger value, so there are few.
  struct Exponents {
    int64_t length;
    std::vector<int16_t> values;
  };
  std::vector<Exponents> exponents_;
  std::vector<int16_t> owned_exponents_;
  Digest digest_;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_SEQUENCE_H_
