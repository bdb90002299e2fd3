#include "attention/sequence.h"

#include "base/check.h"

namespace eduba {

Sequence::Sequence(SequenceSpec spec)
    : spec_(std::move(spec)),
      layers_(spec_.layers),
      exponents_{{0, std::vector<int16_t>(spec_.exponents(), kNoExponent)}},
      owned_exponents_(spec_.exponents(), kNoExponent) {}

absl::Span<const int16_t> Sequence::exponents(int layer, int64_t length) const {
  auto version = exponents_.rbegin();
  while (version->length > length) ++version;  // The first holds from 0.
  const int64_t size = spec_.exponents_per_layer();
  return absl::MakeConstSpan(version->values).subspan(layer * size, size);
}

Digest Sequence::digest() const {
  Digest sum;
  for (const SequenceLayer& layer : layers_) sum += layer.owned.digest();
  return sum;
}

void Sequence::Extend(const std::vector<SequenceLayer>& pages, int64_t length, std::vector<int16_t> exponents,
                      std::vector<int16_t> owned_exponents) {
  EDUBA_CHECK(length > length_);
  EDUBA_CHECK_EQ(pages.size(), layers_.size());
  EDUBA_CHECK_EQ(static_cast<int64_t>(exponents.size()), spec_.exponents());
  EDUBA_CHECK_EQ(static_cast<int64_t>(owned_exponents.size()), spec_.exponents());
  for (size_t layer = 0; layer < pages.size(); ++layer) {
    layers_[layer].owned.PutAll(pages[layer].owned);
    layers_[layer].sinks.PutAll(pages[layer].sinks);
  }
  length_ = length;
  if (exponents != exponents_.back().values) exponents_.push_back({length, std::move(exponents)});
  owned_exponents_ = std::move(owned_exponents);
}

}  // namespace eduba
