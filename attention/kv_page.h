#ifndef EDUBA_ATTENTION_KV_PAGE_H_
#define EDUBA_ATTENTION_KV_PAGE_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/page_store.h"
#include "base/digest.h"
#include "base/elements.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "kernels/backend.h"

namespace eduba {

// A set of the 256 rows of a page: row r is bit r % 64 of word r / 64.
using RowMask = std::array<uint64_t, kLiveWords>;
// Rows [begin, end) of a page. REQUIRES: 0 <= begin <= end <= kPageRows.
RowMask RowsBetween(int64_t begin, int64_t end);
inline constexpr RowMask kAllRows = {~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}};

// The rows of a page that are written, and the sum over them of what PageWriter::DigestOf says.
struct WrittenRows {
  RowMask rows = {};
  Digest digest;
};

// Keys and values of 256 positions of one layer. Tables of pages (page_table.h) share it: whoever holds it
// alone may write it, and nobody does after it is sealed.
struct KvPage {
  explicit KvPage(Page page) : memory(std::move(page)) {}

  Page memory;
  WrittenRows written;
  bool sealed = false;  // All rows are written and final, and the backend has been told.
};

// What is done to pages of one shape. Any thread, on different pages.
class PageWriter {
 public:
  // `backend` outlives the writer.
  PageWriter(Backend* backend, const AttentionShape& shape) : backend_(backend), shape_(shape) {}

  const AttentionShape& shape() const { return shape_; }
  int64_t page_bytes() const { return backend_->PageBytes(shape_); }
  // Bytes of one position's keys, and of its values: all KV heads, in shape().dtype.
  int64_t key_bytes() const {
    return RowBytesOf(shape_.key_dtype, shape_.kv_heads, shape_.head_dim, shape_.value_dim).keys;
  }
  int64_t value_bytes() const {
    return RowBytesOf(shape_.value_dtype, shape_.kv_heads, shape_.head_dim, shape_.value_dim).values;
  }

  // `count` pages that nobody else holds, or none: RESOURCE_EXHAUSTED when the store has not so many.
  absl::StatusOr<std::vector<std::shared_ptr<KvPage>>> Reserve(PageStore* store, int64_t count) const;

  // The sum modulo 2^128, over positions [first, first + count) of a layer, of XXH3_128 of {position int64,
  // layer int64, stored K row, stored V row}. keys [count, kv_heads, head_dim] and values [count, kv_heads,
  // value_dim] are of the shape's type, here and below.
  Digest DigestOf(int layer, int64_t first, int64_t count, const char* keys, const char* values) const;

  // Writes rows [row, row + count), whose digest the caller knows. REQUIRES: they are not written yet.
  absl::Status Write(KvPage& page, int64_t row, int64_t count, const char* keys, const char* values,
                     const Digest& digest) const;
  absl::Status Read(const KvPage& page, int64_t row, int64_t count, char* keys, char* values) const;
  // Makes `to` what `from` is, but not sealed.
  absl::Status Copy(const KvPage& from, KvPage& to) const;
  // Seals the page if all its rows are written.
  absl::Status SealIfFull(KvPage& page) const;

 private:
  Backend* backend_;
  AttentionShape shape_;
};

// Calls visit(page, part) for every page that holds positions of `range`, in ascending order, `part` being
// those positions. The first error ends it.
template <class Visit>
absl::Status ForEachPage(PositionRange range, const Visit& visit) {
  for (int64_t position = range.begin; position < range.end;) {
    const int64_t page = PageOf(position);
    const int64_t end = std::min(PageBegin(page + 1), range.end);
    EDUBA_RETURN_IF_ERROR(visit(page, PositionRange{position, end}));
    position = end;
  }
  return absl::OkStatus();
}

}  // namespace eduba

#endif  // EDUBA_ATTENTION_KV_PAGE_H_
