#include "kernels/cuda/slab_pool.h"

#include <iterator>
#include <map>

#include "base/check.h"
#include "base/mutex.h"

namespace eduba::cuda {
namespace {

constexpr int64_t kAlign = 256;

int64_t RoundUp(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

SlabPool::SlabPool(int64_t bytes) {
  EDUBA_CHECK(bytes >= 0);
  if (bytes >= kAlign) free_[0] = bytes / kAlign * kAlign;
}

int64_t SlabPool::Take(int64_t bytes) {
  EDUBA_CHECK(bytes > 0);
  const MutexLock lock(mutex_);
  const int64_t wanted = RoundUp(bytes);
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const auto [offset, length] = *range;
    if (length < wanted) continue;
    free_.erase(range);
    if (length > wanted) free_[offset + wanted] = length - wanted;
    return offset;
  }
  return -1;
}

void SlabPool::Give(int64_t offset, int64_t bytes) {
  const MutexLock lock(mutex_);
  auto [range, is_new] = free_.emplace(offset, RoundUp(bytes));
  EDUBA_CHECK(is_new);
  if (const auto next = std::next(range); next != free_.end()) {
    EDUBA_CHECK(range->first + range->second <= next->first);
    if (range->first + range->second == next->first) {
      range->second += next->second;
      free_.erase(next);
    }
  }
  if (range == free_.begin()) return;
  const auto before = std::prev(range);
  EDUBA_CHECK(before->first + before->second <= range->first);
  if (before->first + before->second == range->first) {
    before->second += range->second;
    free_.erase(range);
  }
}

int64_t SlabPool::free_bytes() const {
  const MutexLock lock(mutex_);
  int64_t bytes = 0;
  for (const auto& [offset, length] : free_) bytes += length;
  return bytes;
}

}  // namespace eduba::cuda
