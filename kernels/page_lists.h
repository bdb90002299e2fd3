#ifndef EDUBA_KERNELS_PAGE_LISTS_H_
#define EDUBA_KERNELS_PAGE_LISTS_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace eduba {

// Page lists that own their arrays. Moving one keeps the arrays where they are, so views stay valid.
class OwnedPageLists {
 public:
  // No list and no row.
  OwnedPageLists() = default;
  // One list of all `pages` pages, each whole, for all `rows` rows.
  OwnedPageLists(int64_t pages, int64_t rows) : entries_(pages), row_list_(rows, 0) {
    for (int64_t page = 0; page < pages; ++page) entries_[page].page = static_cast<int32_t>(page);
    indptr_.push_back(static_cast<int32_t>(pages));
  }

  // Adds a list and returns its number.
  int32_t AddList(const std::vector<ListedPage>& entries) {
    entries_.insert(entries_.end(), entries.begin(), entries.end());
    indptr_.push_back(static_cast<int32_t>(entries_.size()));
    return static_cast<int32_t>(indptr_.size()) - 2;
  }
  // Adds a row that reads `list`.
  void AddRow(int32_t list) { row_list_.push_back(list); }

  // Valid until the next Add, or the end of this.
  PageLists view() const { return {indptr_, entries_, row_list_}; }

 private:
  std::vector<int32_t> indptr_ = {0};
  std::vector<ListedPage> entries_;
  std::vector<int32_t> row_list_;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_PAGE_LISTS_H_
