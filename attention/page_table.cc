#include "attention/page_table.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

size_t PageTable::LowerBound(int64_t index) const {
  const auto before = [](const PageRef& page, int64_t i) { return page.index < i; };
  return std::lower_bound(refs_.begin(), refs_.end(), index, before) - refs_.begin();
}

int64_t PageTable::Find(int64_t index) const {
  const size_t at = LowerBound(index);
  return at < refs_.size() && refs_[at].index == index ? static_cast<int64_t>(at) : -1;
}

absl::Span<const PageRef> PageTable::Pages(PositionRange range) const {
  if (range.empty()) return {};
  const size_t begin = LowerBound(PageOf(range.begin));
  return absl::MakeConstSpan(refs_).subspan(begin, LowerBound(PageCount(range.end)) - begin);
}

KvPage* PageTable::At(int64_t index) const {
  const int64_t at = Find(index);
  return at < 0 ? nullptr : entries_[at].page.get();
}

bool PageTable::IsShared(int64_t index) const {
  const int64_t at = Find(index);
  return at >= 0 && entries_[at].page.use_count() > 1;
}

Digest PageTable::digest() const {
  Digest sum;
  for (const Entry& entry : entries_) sum += entry.page->written.digest;
  return sum;
}

void PageTable::Put(int64_t index, std::shared_ptr<KvPage> page) {
  const size_t at = LowerBound(index);
  if (at == refs_.size() || refs_[at].index != index) {
    refs_.insert(refs_.begin() + static_cast<int64_t>(at), PageRef{nullptr, index});
    entries_.insert(entries_.begin() + static_cast<int64_t>(at), Entry{});
  }
  refs_[at].data = page->memory.data();
  entries_[at].page = std::move(page);
}

void PageTable::PutAll(const PageTable& other) {
  for (size_t i = 0; i < other.refs_.size(); ++i) Put(other.refs_[i].index, other.entries_[i].page);
}

std::vector<std::shared_ptr<KvPage>> PageTable::Take(absl::FunctionRef<bool(int64_t index)> goes) {
  std::vector<std::shared_ptr<KvPage>> taken;
  size_t kept = 0;
  for (size_t i = 0; i < refs_.size(); ++i) {
    if (goes(refs_[i].index)) {
      taken.push_back(std::move(entries_[i].page));
      continue;
    }
    if (kept != i) {
      refs_[kept] = refs_[i];
      entries_[kept] = std::move(entries_[i]);
    }
    ++kept;
  }
  refs_.resize(kept);
  entries_.resize(kept);
  return taken;
}

absl::Status PageTable::SealFull(const PageWriter& writer) const {
  size_t first = entries_.size();
  while (first > 0 && !entries_[first - 1].page->sealed) --first;
  for (size_t i = first; i < entries_.size(); ++i) {
    EDUBA_RETURN_IF_ERROR(writer.SealIfFull(*entries_[i].page));
  }
  return absl::OkStatus();
}

void PageTable::Mask(int64_t index, PositionRange rows) {
  const int64_t at = Find(index);
  EDUBA_CHECK(at >= 0);
  std::shared_ptr<const RowMask>& live = entries_[at].live;
  RowMask rest = live == nullptr ? kAllRows : *live;
  const RowMask dead = RowsBetween(rows.begin, rows.end);
  for (size_t i = 0; i < rest.size(); ++i) rest[i] &= ~dead[i];
  live = std::make_shared<const RowMask>(rest);
  refs_[at].live = live->data();
}

}  // namespace eduba
