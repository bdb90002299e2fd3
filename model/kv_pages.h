#ifndef EDUBA_MODEL_KV_PAGES_H_
#define EDUBA_MODEL_KV_PAGES_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/kv_page.h"
#include "attention/page_store.h"
#include "attention/page_table.h"
#include "base/pages.h"
#include "base/placement.h"
#include "kernels/backend.h"

namespace eduba {

// Which pages of a layer a node keeps.
struct LayerPages {
  bool owned_only = false;  // Not those of other nodes, ...
  int64_t sink_tokens = 0;  // ... except for copies of the pages that hold the first so many positions.
};

// Keys and values of some rows in the type that they are kept in.
struct StoredRows {
  int64_t rows = 0;
  std::vector<char> keys, values;  // [rows, kv_heads, head_dim]
};

// The keys and values of one context on one node: a page table for every layer. Forks share pages until one
// of them writes. A page that only one context holds is written in place, so nothing may read it meanwhile:
// one thread at a time for a context and all its forks.
class KvPages {
 public:
  using SparePages = std::vector<std::shared_ptr<KvPage>>;

  // `backend` and `store` outlive the pages. The node is number `index` of the placement. Every layer has the
  // same shape.
  KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, const Placement& placement,
          int index, const std::vector<LayerPages>& layers);

  // The same content, on the same pages. Neither sees what is written to the other.
  KvPages Fork() const { return *this; }

  // Makes room for positions [begin, end) in every layer. The positions below `begin` are final: their full
  // pages are sealed, and a last page that a fork holds too becomes a copy. RESOURCE_EXHAUSTED: they do not
  // fit, and nothing has changed.
  absl::Status Reserve(int64_t begin, int64_t end);
  // The same for pages of the caller's choice, which all begin at or after `begin`: pages[layer], ascending.
  // Returns `spare` pages besides, which belong to no layer yet.
  absl::StatusOr<SparePages> Reserve(int64_t begin, absl::Span<const std::vector<int64_t>> pages,
                                     int64_t spare);
  // Makes spare pages the layer's pages `indices`. REQUIRES: the layer does not have those.
  void Lend(int layer, absl::Span<const int64_t> indices, SparePages& spare);
  // Makes the layer's pages `indices`, ascending, spare again. REQUIRES: no fork has them.
  void TakeBack(int layer, absl::Span<const int64_t> indices, SparePages& spare);

  // Keys and values [rows, kv_heads, head_dim] as they are kept, rounded to the shape's type.
  StoredRows Round(int64_t rows, const float* keys, const float* values) const;
  // Writes positions [first, first + rows), for which there is room, as far as their pages are kept.
  // REQUIRES: they are not written yet, or Truncate gave them back.
  absl::Status Write(int layer, int64_t first, const StoredRows& rows);
  // Positions of a layer, whose pages are kept here, as Write took them.
  absl::StatusOr<StoredRows> Read(int layer, PositionRange range) const;
  // Gives back the room that Reserve(length, ...) made, also where rows have been written: a step has failed.
  // Nothing is done where that Reserve had failed itself.
  void Truncate(int64_t length);
  // Gives back the layer's pages that hold only positions of [begin, end); `foreign_only`: and that other
  // nodes own.
  void Drop(int layer, PositionRange range, bool foreign_only = false);

  const AttentionShape& shape() const { return writer_.shape(); }
  const Placement& placement() const { return *placement_; }
  // This node's index in the placement.
  int index() const { return index_; }
  // Bytes of one row's keys, and of its values.
  int64_t key_bytes() const { return writer_.key_bytes(); }
  int64_t value_bytes() const { return writer_.value_bytes(); }
  const PageTable& table(int layer) const { return layers_[layer].table; }
  // The bytes of the pages of all layers; what forks share counts for each.
  int64_t bytes() const;

 private:
  struct Layer {
    LayerPages kept;
    PageTable table;
    // The rows that the page with position reserved_at_ had before rows from there on were written.
    WrittenRows tail;
  };

  bool Owns(int64_t page) const { return placement_->Owns(index_, page); }
  bool Keeps(const Layer& layer, int64_t page) const {
    return !layer.kept.owned_only || Owns(page) || page < PageCount(layer.kept.sink_tokens);
  }

  PageWriter writer_;
  PageStore* store_;
  std::shared_ptr<const Placement> placement_;  // Shared by forks.
  int index_;
  std::vector<Layer> layers_;
  int64_t reserved_at_ = -1;  // Where the last Reserve began.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_KV_PAGES_H_
