#ifndef EDUBA_KERNELS_CPU_HUGE_MEMORY_H_
#define EDUBA_KERNELS_CPU_HUGE_MEMORY_H_

#include <cstdint>

namespace eduba {

// Zeroed memory straight from the kernel, aligned to 2 MiB and backed by huge pages where the machine grants
// them: a stream over gigabytes would otherwise wait for the TLB. nullptr when there is none. Pages are
// committed when first touched.
void* AllocateHuge(int64_t bytes);
void FreeHuge(void* memory, int64_t bytes);

// Memory that is kept between steps and only grows. Its content is lost when it does.
class ScratchMemory {
 public:
  ScratchMemory() = default;
  ~ScratchMemory() { FreeHuge(memory_, bytes_); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  // At least `bytes`, or nullptr when the machine has none left: then it stays as it is.
  void* Reserve(int64_t bytes);
  void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_HUGE_MEMORY_H_
