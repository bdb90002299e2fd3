#include "attention/kv_page.h"

#include <xxhash.h>

#include <cstring>
#include <utility>

#include "base/check.h"

namespace eduba {

RowMask RowsBetween(int64_t begin, int64_t end) {
  EDUBA_CHECK(begin >= 0 && begin <= end && end <= kPageRows);
  const auto below = [](int64_t bits) { return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; };
  RowMask rows;
  for (int64_t word = 0; word < static_cast<int64_t>(rows.size()); ++word) {
    rows[word] = below(std::clamp<int64_t>(end - 64 * word, 0, 64)) &
                 ~below(std::clamp<int64_t>(begin - 64 * word, 0, 64));
  }
  return rows;
}

absl::StatusOr<std::vector<std::shared_ptr<KvPage>>> PageWriter::Reserve(PageStore* store,
                                                                         int64_t count) const {
  EDUBA_ASSIGN_OR_RETURN(std::vector<Page> memory, store->Reserve(page_bytes(), count));
  std::vector<std::shared_ptr<KvPage>> pages;
  pages.reserve(memory.size());
  for (Page& page : memory) pages.push_back(std::make_shared<KvPage>(std::move(page)));
  return pages;
}

Digest PageWriter::DigestOf(int layer, int64_t first, int64_t count, const char* keys,
                            const char* values) const {
  constexpr int64_t kHead = 2 * sizeof(int64_t);
  const int64_t bytes = kHead + key_bytes() + value_bytes();
  const auto row = std::make_unique_for_overwrite<char[]>(bytes);
  Digest sum;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t head[2] = {first + i, layer};
    std::memcpy(row.get(), head, kHead);
    std::memcpy(row.get() + kHead, keys + i * key_bytes(), key_bytes());
    std::memcpy(row.get() + kHead + key_bytes(), values + i * value_bytes(), value_bytes());
    const XXH128_hash_t hash = XXH3_128bits(row.get(), bytes);
    sum += Digest{hash.low64, hash.high64};
  }
  return sum;
}

absl::Status PageWriter::Write(KvPage& page, int64_t row, int64_t count, const char* keys, const char* values,
                               const Digest& digest) const {
  EDUBA_CHECK(!page.sealed);
  const RowMask rows = RowsBetween(row, row + count);
  for (size_t i = 0; i < rows.size(); ++i) {
    EDUBA_CHECK_EQ(page.written.rows[i] & rows[i], 0U);
    page.written.rows[i] |= rows[i];
  }
  page.written.digest += digest;
  return backend_->WriteRows(shape_, page.memory.data(), static_cast<int>(row), static_cast<int>(count), keys,
                             values);
}

absl::Status PageWriter::Read(const KvPage& page, int64_t row, int64_t count, char* keys,
                              char* values) const {
  return backend_->ReadRows(shape_, page.memory.data(), static_cast<int>(row), static_cast<int>(count), keys,
                            values);
}

absl::Status PageWriter::Copy(const KvPage& from, KvPage& to) const {
  to.written = from.written;
  return backend_->CopyPage(shape_, from.memory.data(), to.memory.data());
}

absl::Status PageWriter::SealIfFull(KvPage& page) const {
  if (page.sealed || page.written.rows != kAllRows) return absl::OkStatus();
  page.sealed = true;
  return backend_->SealPage(shape_, page.memory.data());
}

}  // namespace eduba
