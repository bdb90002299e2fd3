#include "attention/page_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {

Page& Page::operator=(Page&& other) noexcept {
  std::swap(store_, other.store_);
  std::swap(data_, other.data_);
  return *this;
}

Page::~Page() {
  if (data_ != nullptr) store_->Release(data_);
}

ReservedBytes& ReservedBytes::operator=(ReservedBytes&& other) noexcept {
  std::swap(store_, other.store_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

ReservedBytes::~ReservedBytes() {
  if (store_ != nullptr) store_->ReleaseBytes(bytes_);
}

PageStore::PageStore(Backend* backend, int64_t memory_bytes)
    : backend_(backend), memory_bytes_(memory_bytes) {
  EDUBA_CHECK(memory_bytes >= 0);
}

PageStore::~PageStore() { EDUBA_CHECK_EQ(used_bytes(), 0); }

absl::StatusOr<std::vector<Page>> PageStore::Reserve(int64_t page_bytes, int64_t count) {
  EDUBA_CHECK(page_bytes > 0 && page_bytes % 64 == 0);
  EDUBA_CHECK(count >= 0);
  std::vector<Page> pages;
  if (count == 0) return pages;

  const MutexLock lock(mutex_);
  SizeClass& sizes = classes_[page_bytes];
  const int64_t free_bytes = memory_bytes_ - taken_bytes_ + sizes.free_pages * page_bytes;
  // In pages, because `count * page_bytes` may not fit into int64.
  if (count > sizes.free_pages + (memory_bytes_ - taken_bytes_) / page_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", count, " pages of ", page_bytes, " bytes, ", free_bytes, " of ", memory_bytes_,
                     " bytes free; delete a session or start the worker with more --memory-bytes"));
  }
  while (sizes.free_pages < count) {
    if (const absl::Status status = AddSlab(page_bytes, count - sizes.free_pages); !status.ok()) {
      DropFreeSlabs(page_bytes);
      return status;
    }
  }
  pages.reserve(count);
  while (static_cast<int64_t>(pages.size()) < count) {
    Slab& slab = slabs_.at(*sizes.with_free.begin());
    while (!slab.free.empty() && static_cast<int64_t>(pages.size()) < count) {
      pages.push_back(Page(this, slab.free.back()));
      slab.free.pop_back();
    }
    if (slab.free.empty()) sizes.with_free.erase(sizes.with_free.begin());
  }
  sizes.free_pages -= count;
  used_bytes_ += count * page_bytes;
  // A large new slab may lie before small ones and take all.
  DropFreeSlabs(page_bytes);
  return pages;
}

absl::StatusOr<ReservedBytes> PageStore::ReserveBytes(int64_t bytes) {
  EDUBA_CHECK(bytes >= 0);
  const MutexLock lock(mutex_);
  if (bytes > memory_bytes_ - taken_bytes_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", bytes, " bytes, ", memory_bytes_ - taken_bytes_, " of ", memory_bytes_,
                     " bytes free; delete a session or start the worker with more --memory-bytes"));
  }
  taken_bytes_ += bytes;
  used_bytes_ += bytes;
  return ReservedBytes(this, bytes);
}

void PageStore::ReleaseBytes(int64_t bytes) {
  const MutexLock lock(mutex_);
  taken_bytes_ -= bytes;
  used_bytes_ -= bytes;
}

int64_t PageStore::used_bytes() const {
  const MutexLock lock(mutex_);
  return used_bytes_;
}

void PageStore::Release(void* page) {
  backend_->ResetPage(page).IgnoreError();  // A device that fails says so in the next call.
  const MutexLock lock(mutex_);
  auto slab = slabs_.upper_bound(static_cast<char*>(page));
  EDUBA_CHECK(slab != slabs_.begin());
  --slab;
  const int64_t page_bytes = slab->second.page_bytes;
  SizeClass& sizes = classes_.at(page_bytes);
  slab->second.free.push_back(static_cast<char*>(page));
  sizes.with_free.insert(slab->first);
  ++sizes.free_pages;
  used_bytes_ -= page_bytes;
  if (static_cast<int64_t>(slab->second.free.size()) * page_bytes == slab->second.bytes) DropSlab(slab);
}

absl::Status PageStore::AddSlab(int64_t page_bytes, int64_t pages_wanted) {
  SizeClass& sizes = classes_.at(page_bytes);
  const int64_t target = std::clamp(sizes.slab_bytes, kSlabBytesMin, kSlabBytesMax);
  const int64_t pages =
      std::min(std::max<int64_t>(1, target / page_bytes), (memory_bytes_ - taken_bytes_) / page_bytes);
  EDUBA_CHECK(pages > 0 && pages_wanted > 0);
  const int64_t bytes = pages * page_bytes;
  auto memory = backend_->AllocateSlab(bytes);
  if (!memory.ok()) {
    return Annotate(memory.status(), absl::StrCat("page memory, ", taken_bytes_, " of ", memory_bytes_,
                                                  " bytes taken before"));
  }
  char* const base = static_cast<char*>(*memory);
  Slab& slab = slabs_[base];
  slab.bytes = bytes;
  slab.page_bytes = page_bytes;
  // Popped from the back, so the lowest address leaves first.
  for (int64_t page = pages - 1; page >= 0; --page) slab.free.push_back(base + page * page_bytes);
  sizes.with_free.insert(base);
  sizes.free_pages += pages;
  sizes.slab_bytes += bytes;
  taken_bytes_ += bytes;
  return absl::OkStatus();
}

void PageStore::DropSlab(Slabs::iterator slab) {
  const int64_t bytes = slab->second.bytes;
  const int64_t page_bytes = slab->second.page_bytes;
  const auto sizes = classes_.find(page_bytes);
  sizes->second.with_free.erase(slab->first);
  sizes->second.free_pages -= bytes / page_bytes;
  sizes->second.slab_bytes -= bytes;
  taken_bytes_ -= bytes;
  backend_->FreeSlab(slab->first, bytes);
  slabs_.erase(slab);
  if (sizes->second.slab_bytes == 0) classes_.erase(sizes);
}

void PageStore::DropFreeSlabs(int64_t page_bytes) {
  std::vector<Slabs::iterator> unused;
  for (char* const base : classes_.at(page_bytes).with_free) {
    const auto slab = slabs_.find(base);
    if (static_cast<int64_t>(slab->second.free.size()) * page_bytes == slab->second.bytes) {
      unused.push_back(slab);
    }
  }
  for (const Slabs::iterator slab : unused) DropSlab(slab);
}

}  // namespace eduba
