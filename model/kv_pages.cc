#include "model/kv_pages.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

KvPages::KvPages(Backend* backend, PageStore* store, const AttentionShape& shape,
                 std::vector<PageShare> shares)
    : backend_(backend), store_(store), shape_(shape), shares_(std::move(shares)), layers_(shares_.size()) {}

absl::Status KvPages::Reserve(int64_t begin, int64_t end) {
  EDUBA_CHECK(begin <= end);
  // Per layer: the last page again, where a fork holds it too, and the pages behind it.
  const auto shared_tail = [&](const Table& table) {
    return begin % kPageRows != 0 && begin < end && !table.refs.empty() &&
           table.refs.back().index == PageOf(begin) && table.pages.back().use_count() > 1;
  };
  const int64_t next = PageCount(std::max(begin, room_));
  int64_t wanted = 0;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    wanted += shared_tail(layers_[layer]) ? 1 : 0;
    for (int64_t page = next; page < PageCount(end); ++page) wanted += shares_[layer].Holds(page);
  }
  if (wanted == 0) {
    room_ = std::max(room_, end);
    return absl::OkStatus();
  }
  EDUBA_ASSIGN_OR_RETURN(std::vector<Page> fresh, store_->Reserve(backend_->PageBytes(shape_), wanted));
  auto take = fresh.begin();
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    Table& table = layers_[layer];
    if (shared_tail(table)) {
      EDUBA_RETURN_IF_ERROR(backend_->CopyPage(shape_, table.refs.back().data, take->data()));
      table.refs.back().data = take->data();
      table.pages.back() = std::make_shared<Page>(std::move(*take++));
    }
    for (int64_t page = next; page < PageCount(end); ++page) {
      if (!shares_[layer].Holds(page)) continue;
      table.refs.push_back({take->data(), page});
      table.pages.push_back(std::make_shared<Page>(std::move(*take++)));
    }
  }
  room_ = std::max(room_, end);
  return absl::OkStatus();
}

absl::Status KvPages::Write(int layer, int64_t first, int64_t rows, const float* keys, const float* values) {
  const int64_t key_row = int64_t{shape_.kv_heads} * shape_.head_dim;
  const int64_t value_row = int64_t{shape_.kv_heads} * shape_.value_dim;
  const auto element = static_cast<int64_t>(DTypeBytes(shape_.dtype));
  const auto round = [&](const float* from, int64_t count) {
    std::vector<char> stored(count * element);
    for (int64_t i = 0; i < count; ++i) StoreElement(stored.data(), shape_.dtype, i, from[i]);
    return stored;
  };
  const std::vector<char> stored_keys = round(keys, rows * key_row);
  const std::vector<char> stored_values = round(values, rows * value_row);
  for (int64_t position = first; position < first + rows;) {
    const int64_t count = std::min(PageBegin(PageOf(position) + 1), first + rows) - position;
    if (shares_[layer].Holds(PageOf(position))) {
      const absl::Span<const PageRef> page = Pages(layer, {position, position + 1});
      EDUBA_CHECK_EQ(page.size(), 1U);
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
  room_ = std::min(room_, length);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    Drop(static_cast<int>(layer), {length, PageBegin(PageCount(kMaxPositions) + 1)});
  }
}

void KvPages::Drop(int layer, PositionRange range) {
  Table& table = layers_[layer];
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  const auto begin = std::lower_bound(table.refs.begin(), table.refs.end(), PageCount(range.begin), before);
  const auto end = std::lower_bound(begin, table.refs.end(), PageOf(range.end), before);
  if (begin >= end) return;
  table.pages.erase(table.pages.begin() + (begin - table.refs.begin()),
                    table.pages.begin() + (end - table.refs.begin()));
  table.refs.erase(begin, end);
}

absl::Span<const PageRef> KvPages::Pages(int layer, PositionRange range) const {
  if (range.empty()) return {};
  const absl::Span<const PageRef> refs = layers_[layer].refs;
  const auto before = [](const PageRef& page, int64_t index) { return page.index < index; };
  const auto* begin = std::lower_bound(refs.begin(), refs.end(), PageOf(range.begin), before);
  const auto* end = std::lower_bound(begin, refs.end(), PageCount(range.end), before);
  return refs.subspan(begin - refs.begin(), end - begin);
}

int64_t KvPages::bytes() const {
  int64_t count = 0;
  for (const Table& table : layers_) count += static_cast<int64_t>(table.refs.size());
  return count * backend_->PageBytes(shape_);
}

}  // namespace eduba
