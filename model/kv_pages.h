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

// Which of a layer's pages a rank holds: those of its stripes, and the first ones, which every rank holds.
// The default: all.
struct PageShare {
  int rank = 0;
  int ranks = 1;
  int64_t stripe_pages = 1;
  int64_t replicated_pages = 0;

  // Each page has one owner: the rank that reads it for a query's keys.
  bool Owns(int64_t page) const { return page / stripe_pages % ranks == rank; }
  bool Holds(int64_t page) const { return page < replicated_pages || Owns(page); }
};

// The keys and values of one context on one worker: a table of pages for every layer. Forks share pages until
// one of them writes. A page that only one context holds is written in place, so nothing may read it
// meanwhile: one thread at a time for a context and all its forks.
class KvPages {
 public:
  // `backend` and `store` outlive the pages. Every layer has the same shape. One share a layer.
  KvPages(Backend* backend, PageStore* store, const AttentionShape& shape, std::vector<PageShare> shares);

  // The same content, on the same pages. The other's writes are never seen.
  KvPages Fork() const { return *this; }

  // Makes room for positions [begin, end) in every layer, as far as this rank holds them; begin is what is
  // filled already. A shared last page becomes a copy. Does nothing where there is room. RESOURCE_EXHAUSTED:
  // they do not fit, and nothing has changed.
  absl::Status Reserve(int64_t begin, int64_t end);
  // Writes those of positions [first, first + rows), for which there is room, that this rank holds: keys and
  // values [rows, kv_heads, head_dim], rounded to the shape's type.
  absl::Status Write(int layer, int64_t first, int64_t rows, const float* keys, const float* values);
  // Gives back room behind the first `length` positions that did not come to be filled.
  void Truncate(int64_t length);
  // Gives back the layer's pages that hold only positions of [begin, end).
  void Drop(int layer, PositionRange range);

  const AttentionShape& shape() const { return shape_; }
  const PageShare& share(int layer) const { return shares_[layer]; }
  // The layer's pages that this rank holds, in ascending order: those with positions of `range`.
  absl::Span<const PageRef> Pages(int layer, PositionRange range) const;
  // Of the pages of all layers; what forks share counts for each.
  int64_t bytes() const;

 private:
  // Pages and what refers to them, in the same order.
  struct Table {
    std::vector<std::shared_ptr<Page>> pages;
    std::vector<PageRef> refs;
  };

  Backend* backend_;
  PageStore* store_;
  AttentionShape shape_;
  std::vector<PageShare> shares_;  // [layers]
  std::vector<Table> layers_;
  int64_t room_ = 0;  // Positions [0, room_) have had room in every layer.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_KV_PAGES_H_
