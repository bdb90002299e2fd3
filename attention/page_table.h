#ifndef EDUBA_ATTENTION_PAGE_TABLE_H_
#define EDUBA_ATTENTION_PAGE_TABLE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/kv_page.h"
#include "base/digest.h"
#include "base/pages.h"
#include "kernels/backend.h"

namespace eduba {

// The pages of one layer that a node keeps, by their absolute index, with holes where it keeps none. A copy
// of a table is a fork: it shares the pages, and neither sees what happens to the other. Whoever wants to
// write a page that another table holds too puts a copy in its place first (PageWriter::Copy), so readers of
// the old table keep what they had. One thread at a time; a table that nobody changes may be read by many.
class PageTable {
 public:
  // Ascending: what the backend reads.
  absl::Span<const PageRef> refs() const { return refs_; }
  // Those of refs() that hold positions of `range`.
  absl::Span<const PageRef> Pages(PositionRange range) const;
  // The page at `index`; null where there is a hole.
  KvPage* At(int64_t index) const;
  // Whether the table has page `index`, and another table has it too.
  bool IsShared(int64_t index) const;
  // The sum of the pages' digests.
  Digest digest() const;

  // Fills the hole at `index`, or takes the place of the page that is there; dead rows of that stay dead.
  void Put(int64_t index, std::shared_ptr<KvPage> page);
  // Puts all of the other table's pages.
  void PutAll(const PageTable& other);
  // Makes holes of the pages for which goes(index), asked in ascending order, is true, and returns them.
  std::vector<std::shared_ptr<KvPage>> Take(absl::FunctionRef<bool(int64_t index)> goes);

  // Seals the pages, of those after the last sealed one, whose rows are all written. REQUIRES: those rows are
  // final.
  absl::Status SealFull(const PageWriter& writer) const;

  // Rows [begin, end) of page `index` (of 0 to kPageRows) are dead from now on: no query reads them through
  // this table. The page itself, and with it the digest, stays as it is; forks made before still read them.
  // REQUIRES: no hole.
  void Mask(int64_t index, PositionRange rows);

 private:
  struct Entry {
    std::shared_ptr<KvPage> page;
    std::shared_ptr<const RowMask> live;  // Null: all rows. Shared by forks, and replaced when it changes.
  };

  // The first page at or after `index`.
  size_t LowerBound(int64_t index) const;
  // Where page `index` is, or -1.
  int64_t Find(int64_t index) const;

  // In the same order.
  std::vector<Entry> entries_;
  std::vector<PageRef> refs_;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_PAGE_TABLE_H_
