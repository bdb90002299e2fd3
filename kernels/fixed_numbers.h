#ifndef EDUBA_KERNELS_FIXED_NUMBERS_H_
#define EDUBA_KERNELS_FIXED_NUMBERS_H_

#include <cstdint>

namespace eduba {

// The same numbers in [-1, 1) on every machine, from integers alone, so that no library can change them.
class FixedNumbers {
 public:
  float Next() {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<float>(static_cast<int32_t>(state_ >> 40) - (1 << 23)) * 0x1p-23F;
  }

 private:
  uint64_t state_ = 1;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_FIXED_NUMBERS_H_
