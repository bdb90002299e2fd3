#ifndef EDUBA_KERNELS_CPU_FLUSHED_SUBNORMALS_H_
#define EDUBA_KERNELS_CPU_FLUSHED_SUBNORMALS_H_

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace eduba {

// While it lives, SIMD arithmetic of this thread takes subnormal operands for zeros, and gives zeros for
// them. Does nothing on other chips than x86.
class FlushedSubnormals {
 public:
#if defined(__x86_64__)
  FlushedSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZeros); }
  ~FlushedSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  static constexpr unsigned kDenormalsAreZeros = 0x0040;
  const unsigned before_;

 public:
#else
  FlushedSubnormals() = default;
#endif
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_FLUSHED_SUBNORMALS_H_
