#include "model/kv_pages.h"

#include <algorithm>
#include <utility>

#include "attention/rows.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

KvPages::KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, const Placement& placement,
                 int index, const std::vector<LayerPages>& layers)
    : writer_(backend, shape),
      store_(store),
      placement_(std::make_shared<const Placement>(placement)),
      index_(index) {
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
  const int64_t tail = PageOf(begin);
  const bool continues = begin % kPageRows != 0;
  int64_t wanted = spare;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const PageTable& table = layers_[layer].table;
    EDUBA_CHECK(!continues || !Keeps(layers_[layer], tail) || table.At(tail) != nullptr);
    wanted += (continues && table.IsShared(tail) ? 1 : 0) + static_cast<int64_t>(pages[layer].size());
  }
  EDUBA_ASSIGN_OR_RETURN(SparePages fresh, writer_.Reserve(store_, wanted));
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    PageTable& table = layers_[layer].table;
    EDUBA_RETURN_IF_ERROR(table.SealFull(writer_));
    if (continues && table.IsShared(tail)) {
      EDUBA_RETURN_IF_ERROR(writer_.Copy(*table.At(tail), *fresh.back()));
      table.Put(tail, std::move(fresh.back()));
      fresh.pop_back();
    }
    if (continues && table.At(tail) != nullptr) layers_[layer].tail = table.At(tail)->written;
    Lend(static_cast<int>(layer), pages[layer], fresh);
  }
  reserved_at_ = begin;
  EDUBA_CHECK_EQ(static_cast<int64_t>(fresh.size()), spare);
  return fresh;
}

void KvPages::Lend(int layer, absl::Span<const int64_t> indices, SparePages& spare) {
  PageTable& table = layers_[layer].table;
  for (const int64_t index : indices) {
    EDUBA_CHECK(table.At(index) == nullptr);
    EDUBA_CHECK(!spare.empty());
    table.Put(index, std::move(spare.back()));
    spare.pop_back();
  }
}

void KvPages::TakeBack(int layer, absl::Span<const int64_t> indices, SparePages& spare) {
  auto taken = layers_[layer].table.Take(
      [&](int64_t index) { return std::binary_search(indices.begin(), indices.end(), index); });
  for (std::shared_ptr<KvPage>& page : taken) {
    EDUBA_CHECK_EQ(page.use_count(), 1);
    EDUBA_CHECK(!page->sealed);
    spare.push_back(std::make_shared<KvPage>(std::move(page->memory)));
  }
}

StoredRows KvPages::Round(int64_t rows, const float* keys, const float* values) const {
  StoredRows stored{rows, std::vector<char>(rows * key_bytes()), std::vector<char>(rows * value_bytes())};
  ConvertElements(keys, DType::kF32, stored.keys.data(), shape().key_dtype,
                  rows * shape().kv_heads * shape().head_dim);
  ConvertElements(values, DType::kF32, stored.values.data(), shape().value_dtype,
                  rows * shape().kv_heads * shape().value_dim);
  return stored;
}

absl::Status KvPages::Write(int layer, int64_t first, const StoredRows& rows) {
  const Layer& own = layers_[layer];
  return ForEachPage({first, first + rows.rows}, [&](int64_t index, PositionRange part) {
    KvPage* const page = own.table.At(index);
    EDUBA_CHECK_EQ(page != nullptr, Keeps(own, index));
    if (page == nullptr) return absl::OkStatus();
    const char* const keys = rows.keys.data() + (part.begin - first) * key_bytes();
    const char* const values = rows.values.data() + (part.begin - first) * value_bytes();
    return writer_.Write(*page, part.begin - PageBegin(index), part.size(), keys, values,
                         writer_.DigestOf(layer, part.begin, part.size(), keys, values));
  });
}

absl::StatusOr<StoredRows> KvPages::Read(int layer, PositionRange range) const {
  StoredRows rows{range.size(), std::vector<char>(range.size() * key_bytes()),
                  std::vector<char>(range.size() * value_bytes())};
  EDUBA_RETURN_IF_ERROR(ForEachPage(range, [&](int64_t index, PositionRange part) {
    const KvPage* const page = table(layer).At(index);
    EDUBA_CHECK(page != nullptr);
    return writer_.Read(*page, part.begin - PageBegin(index), part.size(),
                        rows.keys.data() + (part.begin - range.begin) * key_bytes(),
                        rows.values.data() + (part.begin - range.begin) * value_bytes());
  }));
  return rows;
}

void KvPages::Truncate(int64_t length) {
  const int64_t tail = PageOf(length);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    PageTable& table = layers_[layer].table;
    table.Take([&](int64_t index) { return index >= PageCount(length); });
    KvPage* const page = reserved_at_ == length ? table.At(tail) : nullptr;
    if (page != nullptr) page->written = layers_[layer].tail;
  }
}

void KvPages::Drop(int layer, PositionRange range, bool foreign_only) {
  layers_[layer].table.Take([&](int64_t page) {
    const bool inside = page >= PageCount(range.begin) && PageBegin(page + 1) <= range.end;
    return inside && !(foreign_only && Owns(page));
  });
}

int64_t KvPages::bytes() const {
  int64_t count = 0;
  for (const Layer& layer : layers_) count += static_cast<int64_t>(layer.table.refs().size());
  return count * writer_.page_bytes();
}

}  // namespace eduba
