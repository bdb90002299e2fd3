#include "attention/sequence.h"

#include "base/check.h"

namespace eduba {

void PageTable::Put(int64_t index, Page page) {
  const PageRef ref{page.data(), index};
  if (!refs_.empty() && refs_.back().index == index) {
    pages_.back() = std::move(page);
    refs_.back() = ref;
    return;
  }
  EDUBA_CHECK(refs_.empty() || refs_.back().index < index);
  pages_.push_back(std::move(page));
  refs_.push_back(ref);
}

const void* PageTable::Tail(int64_t index) const {
  return !refs_.empty() && refs_.back().index == index ? refs_.back().data : nullptr;
}

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

void Sequence::Extend(int64_t length, std::vector<int16_t> exponents, std::vector<int16_t> owned_exponents,
                      const Digest& appended) {
  EDUBA_CHECK(length > length_);
  EDUBA_CHECK_EQ(static_cast<int64_t>(exponents.size()), spec_.exponents());
  EDUBA_CHECK_EQ(static_cast<int64_t>(owned_exponents.size()), spec_.exponents());
  length_ = length;
  if (exponents != exponents_.back().values) exponents_.push_back({length, std::move(exponents)});
  owned_exponents_ = std::move(owned_exponents);
  digest_ += appended;
}

}  // namespace eduba
