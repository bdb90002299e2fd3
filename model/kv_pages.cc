#include "model/kv_pages.h"

#include <algorithm>
#include <utility>

#include "attention/rows.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

KvPages::KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, const PageShare& share,
                 const std::vector<LayerPages>& layers)
    : backend_(backend), store_(store), shape_(shape), share_(share) {
  for (const LayerPages& kept : layers) layers_.push_back({kept, {}, {}});
}

absl::Status KvPages::Reserve(int64_t begin, int64_t end) {
  EDUBA_CHECK(begin <= end);
  // Per layer: the last page again, where a fork holds it too, and the pages behind it.
  const auto shared_tail = [&](const Table& table) {
    if (begin % kPageRows == 0 || begin == end || !Keeps(table, PageOf(begin))) return false;
    EDUBA_CHECK_EQ(table.refs.back().index, PageOf(begin));
    return table.pages.back().use_count() > 1;
  };
  int64_t wanted = 0;
  for (const Table& table : layers_) {
    wanted += shared_tail(table) ? 1 : 0;
    for (int64_t page = PageCount(begin); page < PageCount(end); ++page) wanted += Keeps(table, page) ? 1 : 0;
  }
  if (wanted == 0) return absl::OkStatus();
  EDUBA_ASSIGN_OR_RETURN(std::vector<Page> fresh, store_->Reserve(backend_->PageBytes(shape_), wanted));
  auto take = fresh.begin();
  for (Table& table : layers_) {
    if (shared_tail(table)) {
      EDUBA_RETURN_IF_ERROR(backend_->CopyPage(shape_, table.refs.back().data, take->data()));
      table.refs.back().data = take->data();
      table.pages.back() = std::make_shared<Page>(std::move(*take++));
    }
    for (int64_t page = PageCount(begin); page < PageCount(end); ++page) {
      if (!Keeps(table, page)) continue;
      table.refs.push_back({take->data(), page});
      table.pages.push_back(std::make_shared<Page>(std::move(*take++)));
    }
  }
  return absl::OkStatus();
}

absl::Status KvPages::Write(int layer, int64_t first, int64_t rows, const float* keys, const float* values) {
  const int64_t key_row = int64_t{shape_.kv_heads} * shape_.head_dim;
  const int64_t value_row = int64_t{shape_.kv_heads} * shape_.value_dim;
  const auto element = static_cast<int64_t>(DTypeBytes(shape_.dtype));
  const auto round = [&](const float* from, int64_t count) {
    std::vector<char> stored(count * element);
    ConvertElements(from, DType::kF32, stored.data(), shape_.dtype, count);
    return stored;
  };
  const std::vector<char> stored_keys = round(keys, rows * key_row);
  const std::vector<char> stored_values = round(values, rows * value_row);
  for (int64_t position = first; position < first + rows;) {
    const int64_t count = std::min(PageBegin(PageOf(position) + 1), first + rows) - position;
    const absl::Span<const PageRef> page = Pages(layer, {position, position + 1});
    EDUBA_CHECK_EQ(page.size(), Keeps(layers_[layer], PageOf(position)) ? 1U : 0U);
    if (!page.empty()) {
      EDUBA_RETURN_IF_ERROR(backend_->WriteRows(
          shape_, const_cast<void*>(page[0].data), static_cast<int>(position % kPageRows),
          static_cast<int>(count), stored_keys.data() + (position - first) * key_row * element,
          stored_values.data() + (position - first) * value_row * element));
    }
    position += count;
  }
  return absl::OkStatus();
}

void KvPages::Truncate(int64_t length) {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    Drop(static_cast<int>(layer), {length, PageBegin(PageCount(kMaxPositions) + 1)});
  }
}

void KvPages::Drop(int layer, PositionRange range, bool foreign_only) {
  Table& table = layers_[layer];
  size_t kept = 0;
  for (size_t i = 0; i < table.refs.size(); ++i) {
    const int64_t page = table.refs[i].index;
    const bool inside = page >= PageCount(range.begin) && PageBegin(page + 1) <= range.end;
    if (inside && !(foreign_only && share_.Owns(page))) continue;
    if (kept != i) {
      table.refs[kept] = table.refs[i];
      table.pages[kept] = std::move(table.pages[i]);
    }
    ++kept;
  }
  table.refs.resize(kept);
  table.pages.resize(kept);
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
