#include "base/heap.h"

#include <malloc.h>

namespace eduba {

void KeepFreedMemory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // The most that glibc takes.
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

}  // namespace eduba
