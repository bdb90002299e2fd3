#ifndef EDUBA_KERNELS_PAGE_HEADER_H_
#define EDUBA_KERNELS_PAGE_HEADER_H_

#include <cstring>

#include "base/check.h"
#include "kernels/backend.h"

// The headers of pages that are host memory.
namespace eduba {

inline PageHeader& HeaderOf(void* page) { return *static_cast<PageHeader*>(page); }

// Writes only where there is something to clear: the memory may never have been touched.
inline void ResetHeader(void* page) {
  static constexpr PageHeader kFresh;
  if (std::memcmp(page, &kFresh, sizeof(kFresh)) != 0) HeaderOf(page) = kFresh;
}
inline void SealHeader(void* page) {
  EDUBA_CHECK_EQ(HeaderOf(page).is_sealed, 0);
  HeaderOf(page).is_sealed = 1;
}
// Aborts where the page is sealed.
inline void CheckWritable(void* page) { EDUBA_CHECK_EQ(HeaderOf(page).is_sealed, 0); }
// After a copy of a whole page: the copy may be written.
inline void UnsealCopy(void* page) { HeaderOf(page).is_sealed = 0; }

}  // namespace eduba

#endif  // EDUBA_KERNELS_PAGE_HEADER_H_
