#include "model/kv_pages.h"

#include <algorithm>
#include <utility>

#include "attention/rows.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// Removes those for which goes(index) is true; it is asked in ascending order, and may take the page.
template <class Goes>
void RemovePages(std::vector<PageRef>& refs, std::vector<std::shared_ptr<Page>>& pages, const Goes& goes) {
  size_t kept = 0;
  for (size_t i = 0; i < refs.size(); ++i) {
    if (goes(i)) continue;
    if (kept != i) {
      refs[kept] = refs[i];
      pages[kept] = std::move(pages[i]);
    }
    ++kept;
  }
  refs.resize(kept);
  pages.resize(kept);
}

}  // namespace

KvPages::KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, const PageShare& share,
                 const std::vector<LayerPages>& layers)
    : backend_(backend), store_(store), shape_(shape), share_(share) {
  for (const LayerPages& kept : layers) layers_.push_back({kept, {}, {}});
}

absl::Status KvPages::Reserve(int64_t begin, int64_t end) {
  EDUBA_CHECK(begin <= end);
  if (begin == end) return absl::OkStatus();
  std::vector<std::vector<int64_t>> pages(layers_.size());
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    for (int64_t page = PageCount(begin); page < PageCount(end); ++page) {
      if (Keeps(layers_[layer], page)) pages[layer].push_back(page);
    }
  }
  return Reserve(begin, pages, 0).status();
}

absl::StatusOr<KvPages::SparePages> KvPages::Reserve(int64_t begin,
                                                     absl::Span<const std::vector<int64_t>> pages,
                                                     int64_t spare) {
  // Per layer: the last page again, where a fork holds it too, and the pages behind it.
  const auto shared_tail = [&](const Table& table) {
    if (begin % kPageRows == 0 || !Keeps(table, PageOf(begin))) return false;
    EDUBA_CHECK_EQ(table.refs.back().index, PageOf(begin));
    return table.pages.back().use_count() > 1;
  };
  int64_t wanted = spare;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    wanted += (shared_tail(layers_[layer]) ? 1 : 0) + static_cast<int64_t>(pages[layer].size());
  }
  SparePages fresh;
  if (wanted == 0) return fresh;
  EDUBA_ASSIGN_OR_RETURN(std::vector<Page> taken, store_->Reserve(backend_->PageBytes(shape_), wanted));
  for (Page& page : taken) fresh.push_back(std::make_shared<Page>(std::move(page)));
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    Table& table = layers_[layer];
    if (shared_tail(table)) {
      EDUBA_RETURN_IF_ERROR(backend_->CopyPage(shape_, table.refs.back().data, fresh.back()->data()));
      table.refs.back().data = fresh.back()->data();
      table.pages.back() = std::move(fresh.back());
      fresh.pop_back();
    }
    Lend(static_cast<int>(layer), pages[layer], fresh);
  }
  EDUBA_CHECK_EQ(static_cast<int64_t>(fresh.size()), spare);
  return fresh;
}

void KvPages::Lend(int layer, absl::Span<const int64_t> indices, SparePages& spare) {
  Table& table = layers_[layer];
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  for (const int64_t index : indices) {
    const auto ref = std::lower_bound(table.refs.begin(), table.refs.end(), index, before);
    EDUBA_CHECK(ref == table.refs.end() || ref->index != index);
    EDUBA_CHECK(!spare.empty());
    const auto page = table.pages.begin() + (ref - table.refs.begin());
    table.refs.insert(ref, {spare.back()->data(), index});
    table.pages.insert(page, std::move(spare.back()));
    spare.pop_back();
  }
}

void KvPages::TakeBack(int layer, absl::Span<const int64_t> indices, SparePages& spare) {
  Table& table = layers_[layer];
  RemovePages(table.refs, table.pages, [&](size_t i) {
    if (!std::binary_search(indices.begin(), indices.end(), table.refs[i].index)) return false;
    EDUBA_CHECK_EQ(table.pages[i].use_count(), 1);
    spare.push_back(std::move(table.pages[i]));
    return true;
  });
}

int64_t KvPages::key_bytes() const {
  return int64_t{shape_.kv_heads} * shape_.head_dim * static_cast<int64_t>(DTypeBytes(shape_.key_dtype));
}

int64_t KvPages::value_bytes() const {
  return int64_t{shape_.kv_heads} * shape_.value_dim * static_cast<int64_t>(DTypeBytes(shape_.value_dtype));
}

StoredRows KvPages::Round(int64_t rows, const float* keys, const float* values) const {
  StoredRows stored{rows, std::vector<char>(rows * key_bytes()), std::vector<char>(rows * value_bytes())};
  ConvertElements(keys, DType::kF32, stored.keys.data(), shape_.key_dtype,
                  rows * shape_.kv_heads * shape_.head_dim);
  ConvertElements(values, DType::kF32, stored.values.data(), shape_.value_dtype,
                  rows * shape_.kv_heads * shape_.value_dim);
  return stored;
}

absl::Status KvPages::Write(int layer, int64_t first, const StoredRows& rows) {
  for (int64_t position = first; position < first + rows.rows;) {
    const int64_t count = std::min(PageBegin(PageOf(position) + 1), first + rows.rows) - position;
    const absl::Span<const PageRef> page = Pages(layer, {position, position + 1});
    EDUBA_CHECK_EQ(page.size(), Keeps(layers_[layer], PageOf(position)) ? 1U : 0U);
    if (!page.empty()) {
      EDUBA_RETURN_IF_ERROR(
          backend_->WriteRows(shape_, const_cast<void*>(page[0].data), static_cast<int>(position % kPageRows),
                              static_cast<int>(count), rows.keys.data() + (position - first) * key_bytes(),
                              rows.values.data() + (position - first) * value_bytes()));
    }
    position += count;
  }
  return absl::OkStatus();
}

absl::StatusOr<StoredRows> KvPages::Read(int layer, PositionRange range) const {
  StoredRows rows{range.size(), std::vector<char>(range.size() * key_bytes()),
                  std::vector<char>(range.size() * value_bytes())};
  for (int64_t position = range.begin; position < range.end;) {
    const int64_t count = std::min(PageBegin(PageOf(position) + 1), range.end) - position;
    const absl::Span<const PageRef> page = Pages(layer, {position, position + 1});
    EDUBA_CHECK_EQ(page.size(), 1U);
    EDUBA_RETURN_IF_ERROR(backend_->ReadRows(shape_, page[0].data, static_cast<int>(position % kPageRows),
                                             static_cast<int>(count),
                                             rows.keys.data() + (position - range.begin) * key_bytes(),
                                             rows.values.data() + (position - range.begin) * value_bytes()));
    position += count;
  }
  return rows;
}

void KvPages::Truncate(int64_t length) {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    Drop(static_cast<int>(layer), {length, PageBegin(PageCount(kMaxPositions) + 1)});
  }
}

void KvPages::Drop(int layer, PositionRange range, bool foreign_only) {
  Table& table = layers_[layer];
  RemovePages(table.refs, table.pages, [&](size_t i) {
    const int64_t page = table.refs[i].index;
    const bool inside = page >= PageCount(range.begin) && PageBegin(page + 1) <= range.end;
    return inside && !(foreign_only && share_.Owns(page));
  });
}

absl::Span<const PageRef> KvPages::Pages(int layer, PositionRange range) const {
  if (range.empty()) return {};
  const absl::Span<const PageRef> refs = layers_[layer].refs;
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  const auto* begin = std::lower_bound(refs.begin(), refs.end(), PageOf(range.begin), before);
  const auto* end = std::lower_bound(begin, refs.end(), PageCount(range.end), before);
  return refs.subspan(begin - refs.begin(), end - begin);
}

std::vector<PageRef> KvPages::OwnedPages(int layer, PositionRange range) const {
  std::vector<PageRef> owned;
  for (const PageRef& page : Pages(layer, range)) {
    if (share_.Owns(page.index)) owned.push_back(page);
  }
  return owned;
}

int64_t KvPages::bytes() const {
  int64_t count = 0;
  for (const Table& table : layers_) count += static_cast<int64_t>(table.refs.size());
  return count * backend_->PageBytes(shape_);
}

}  // namespace eduba
