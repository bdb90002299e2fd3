#ifndef EDUBA_MODEL_KV_PAGES_H_
#define EDUBA_MODEL_KV_PAGES_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/page_store.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// A worker's share of the pages of a group: stripes go round the ranks. A function of a page's index alone.
struct PageShare {
  int rank = 0;
  int size = 1;
  int64_t stripe_pages = 64;

  bool Owns(int64_t page) const { return page / stripe_pages % size == rank; }
};

// Which pages of a layer a context keeps here.
struct LayerPages {
  bool owned_only = false;  // Not those of other workers, ...
  int64_t sink_tokens = 0;  // ... except for copies of the pages that hold the first so many positions.
};

// Keys and values of some rows in the type that they are kept in.
struct StoredRows {
  int64_t rows = 0;
  std::vector<char> keys, values;  // [rows, kv_heads, head_dim]
};

// The keys and values of one context on one worker: a table of pages for every layer. Forks share pages until
// one of them writes. A page that only one context holds is written in place, so nothing may read it
// meanwhile: one thread at a time for a context and all its forks.
class KvPages {
 public:
  using SparePages = std::vector<std::shared_ptr<Page>>;

  // `backend` and `store` outlive the pages. Every layer has the same shape.
  KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, const PageShare& share,
          const std::vector<LayerPages>& layers);

  // The same content, on the same pages. The other's writes are never seen.
  KvPages Fork() const { return *this; }

  // Makes room for positions [begin, end) in every layer; begin is what is filled already. A shared last page
  // becomes a copy. RESOURCE_EXHAUSTED: they do not fit, and nothing has changed.
  absl::Status Reserve(int64_t begin, int64_t end);
  // The same for pages of the caller's choice, all behind `begin`: pages[layer], ascending. Besides `spare`
  // pages that belong to no layer yet.
  absl::StatusOr<SparePages> Reserve(int64_t begin, absl::Span<const std::vector<int64_t>> pages,
                                     int64_t spare);
  // Makes spare pages the layer's pages `indices`, and spare ones of them again. The layer does not have them
  // before, and is the only one that holds them.
  void Lend(int layer, absl::Span<const int64_t> indices, SparePages& spare);
  void TakeBack(int layer, absl::Span<const int64_t> indices, SparePages& spare);

  // Keys and values [rows, kv_heads, head_dim] as they are kept, rounded to the shape's type.
  StoredRows Round(int64_t rows, const float* keys, const float* values) const;
  // Writes positions [first, first + rows), for which there is room, as far as their pages are kept.
  absl::Status Write(int layer, int64_t first, const StoredRows& rows);
  // Positions of a layer, whose pages are kept here, as Write took them.
  absl::StatusOr<StoredRows> Read(int layer, PositionRange range) const;
  // Gives back room behind the first `length` positions that did not come to be filled.
  void Truncate(int64_t length);
  // Gives back the layer's pages that hold only positions of [begin, end); `foreign_only`: and that other
  // workers own.
  void Drop(int layer, PositionRange range, bool foreign_only = false);

  const AttentionShape& shape() const { return shape_; }
  const PageShare& share() const { return share_; }
  // Bytes of one row's keys, and of its values.
  int64_t key_bytes() const;
  int64_t value_bytes() const;
  // The layer's pages in ascending order: those that hold positions of `range`.
  absl::Span<const PageRef> Pages(int layer, PositionRange range) const;
  // Those of them that this worker owns.
  std::vector<PageRef> OwnedPages(int layer, PositionRange range) const;
  // Of the pages of all layers; what forks share counts for each.
  int64_t bytes() const;

 private:
  // Pages and what refers to them, in the same order.
  struct Table {
    LayerPages kept;
    std::vector<std::shared_ptr<Page>> pages;
    std::vector<PageRef> refs;
  };

  bool Keeps(const Table& table, int64_t page) const {
    return !table.kept.owned_only || share_.Owns(page) || page < PageCount(table.kept.sink_tokens);
  }

  Backend* backend_;
  PageStore* store_;
  AttentionShape shape_;
  PageShare share_;
  std::vector<Table> layers_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_KV_PAGES_H_
