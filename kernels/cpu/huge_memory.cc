#include "kernels/cpu/huge_memory.h"

#include <sys/mman.h>

#include <cstdint>

#include "base/check.h"

namespace eduba {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kSmallPage = 4096;

int64_t RoundUp(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// Small blocks gain nothing from a huge page and would waste most of it.
int64_t Alignment(int64_t bytes) { return bytes >= kHugePage ? kHugePage : kSmallPage; }

}  // namespace

void* AllocateHuge(int64_t bytes) {
  const int64_t alignment = Alignment(bytes);
  bytes = RoundUp(bytes, kSmallPage);
  const int64_t mapped = bytes + alignment - kSmallPage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  // Give back what lies before and after the aligned part.
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto begin = static_cast<uintptr_t>(RoundUp(static_cast<int64_t>(address), alignment));
  char* const aligned = static_cast<char*>(memory) + (begin - address);
  if (begin > address) munmap(memory, begin - address);
  if (address + mapped > begin + bytes) {
    munmap(aligned + bytes, address + mapped - begin - bytes);
  }
  if (alignment == kHugePage) madvise(aligned, bytes, MADV_HUGEPAGE);  // A wish: without it all still works.
  return aligned;
}

void FreeHuge(void* memory, int64_t bytes) {
  if (memory != nullptr) EDUBA_CHECK_EQ(munmap(memory, RoundUp(bytes, kSmallPage)), 0);
}

void* ScratchMemory::Reserve(int64_t bytes) {
  if (bytes > bytes_) {
    void* const larger = AllocateHuge(bytes);
    if (larger == nullptr) return nullptr;
    FreeHuge(memory_, bytes_);
    memory_ = larger;
    bytes_ = bytes;
  }
  return memory_;
}

}  // namespace eduba
