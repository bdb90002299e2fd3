#ifndef EDUBA_ATTENTION_PAGE_STORE_H_
#define EDUBA_ATTENTION_PAGE_STORE_H_

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "kernels/backend.h"

namespace eduba {

class PageStore;

// One page of backend memory, given back when it is destroyed. Must not outlive its PageStore.
class Page {
 public:
  Page() = default;
  Page(Page&& other) noexcept { *this = std::move(other); }
  Page& operator=(Page&& other) noexcept;
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  ~Page();

  void* data() const { return data_; }

 private:
  friend class PageStore;
  Page(PageStore* store, void* data) : store_(store), data_(data) {}

  PageStore* store_ = nullptr;
  void* data_ = nullptr;
};

// Bytes of a store's budget for memory that is not pages: whoever holds this may allocate as many elsewhere.
// Given back when it is destroyed. Must not outlive its PageStore.
class ReservedBytes {
 public:
  ReservedBytes() = default;
  ReservedBytes(ReservedBytes&& other) noexcept { *this = std::move(other); }
  ReservedBytes& operator=(ReservedBytes&& other) noexcept;
  ReservedBytes(const ReservedBytes&) = delete;
  ReservedBytes& operator=(const ReservedBytes&) = delete;
  ~ReservedBytes();

 private:
  friend class PageStore;
  ReservedBytes(PageStore* store, int64_t bytes) : store_(store), bytes_(bytes) {}

  PageStore* store_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out pages from a byte budget that is fixed at the start. Memory comes from the backend in slabs, each
// cut into pages of one size. The first slab of a size is small, and each further one doubles what the size
// has, up to slabs of kSlabBytesMax (or one page, where a page is larger). A slab goes back to the backend
// when its last page does. Thread-safe.
class PageStore {
 public:
  static constexpr int64_t kSlabBytesMin = int64_t{256} << 10;
  static constexpr int64_t kSlabBytesMax = int64_t{16} << 20;

  // The bytes of slabs and those reserved never exceed `memory_bytes`. `backend` must outlive the store.
  PageStore(Backend* backend, int64_t memory_bytes);
  // REQUIRES: every Page and all ReservedBytes are gone.
  ~PageStore();
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;

  // `count` pages of `page_bytes` each, or none: RESOURCE_EXHAUSTED when they do not fit. What is in a page
  // is undefined.
  absl::StatusOr<std::vector<Page>> Reserve(int64_t page_bytes, int64_t count);

  // `bytes`, or none: RESOURCE_EXHAUSTED when they do not fit. REQUIRES: bytes >= 0.
  absl::StatusOr<ReservedBytes> ReserveBytes(int64_t bytes);

  int64_t memory_bytes() const { return memory_bytes_; }
  // Bytes of the pages that exist, and those reserved.
  int64_t used_bytes() const;

 private:
  friend class Page;
  friend class ReservedBytes;
  struct Slab {
    int64_t bytes = 0;
    int64_t page_bytes = 0;
    std::vector<char*> free;  // Pages of this slab that nobody holds.
  };
  using Slabs = std::map<char*, Slab>;  // By first byte.
  // All slabs of one page size.
  struct SizeClass {
    int64_t slab_bytes = 0;
    int64_t free_pages = 0;
    // First bytes of slabs that have free pages; the lowest address is used first.
    std::set<char*> with_free;
  };

  void Release(void* page);
  void ReleaseBytes(int64_t bytes);
  absl::Status AddSlab(int64_t page_bytes, int64_t pages_wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropSlab(Slabs::iterator slab) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropFreeSlabs(int64_t page_bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Backend* const backend_;
  const int64_t memory_bytes_;
  mutable Mutex mutex_;
  Slabs slabs_ ABSL_GUARDED_BY(mutex_);
  std::map<int64_t, SizeClass> classes_ ABSL_GUARDED_BY(mutex_);  // By page bytes.
  int64_t taken_bytes_ ABSL_GUARDED_BY(mutex_) = 0;               // The bytes of slabs and of reservations.
  int64_t used_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace eduba

#endif  // EDUBA_ATTENTION_PAGE_STORE_H_
