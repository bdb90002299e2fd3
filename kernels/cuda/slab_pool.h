#ifndef EDUBA_KERNELS_CUDA_SLAB_POOL_H_
#define EDUBA_KERNELS_CUDA_SLAB_POOL_H_

#include <cstdint>
#include <map>

#include "base/mutex.h"

namespace eduba::cuda {

// Cuts slabs out of one range of addresses, lowest first, and joins what comes back. No memory of its own: it
// counts bytes of the device's. Thread-safe.
class SlabPool {
 public:
  // Bytes [0, bytes) are free. REQUIRES: bytes >= 0.
  explicit SlabPool(int64_t bytes);

  // The offset of `bytes` bytes, a multiple of 256; -1 where no free range is long enough. REQUIRES: bytes >
  // 0.
  int64_t Take(int64_t bytes);
  // What Take(bytes) returned.
  void Give(int64_t offset, int64_t bytes);

  int64_t free_bytes() const;

 private:
  mutable Mutex mutex_;
  std::map<int64_t, int64_t> free_ ABSL_GUARDED_BY(mutex_);  // First byte to length; no two touch.
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_SLAB_POOL_H_
