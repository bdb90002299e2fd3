#ifndef EDUBA_KERNELS_CPU_FOR_TARGET_H_
#define EDUBA_KERNELS_CPU_FOR_TARGET_H_

#include <cstdint>

#include "base/mutex.h"
#include "hwy/targets.h"

namespace eduba {

namespace internal {
inline Mutex target_mutex;
}  // namespace internal

// What `choose`, a HWY_DYNAMIC_DISPATCH, finds for one of Highway's targets that this machine runs. Highway
// chooses once for the process; its test hook lets us take an entry of the table for each target, and callers
// keep what they took. The choice is global, so one thread at a time.
template <class Choose>
auto ForTarget(int64_t target, const Choose& choose) {
  const MutexLock lock(internal::target_mutex);
  hwy::GetChosenTarget().Update(target);
  const auto found = choose();
  hwy::GetChosenTarget().DeInit();
  return found;
}

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_FOR_TARGET_H_
