#ifndef EDUBA_KERNELS_CPU_KEPT_PARTIALS_H_
#define EDUBA_KERNELS_CPU_KEPT_PARTIALS_H_

#include <cstdint>
#include <deque>

#include "kernels/cpu/huge_memory.h"

namespace eduba {

// Where the steps in progress keep their partials. Grows block by block, because what is in use cannot move;
// once no step is in progress, the blocks become one. Holds `most` bytes at most, and keeps what it has.
class KeptPartials {
 public:
  explicit KeptPartials(int64_t most) : most_(most) {}

  // Memory for one step, aligned to 64 bytes, until Return; what is in it is not known. nullptr where there
  // is no room: then there is nothing to return.
  float* Take(int64_t bytes);
  void Return() { --steps_; }

  int64_t bytes() const { return bytes_; }

 private:
  bool AddBlock(int64_t bytes);

  const int64_t most_;
  int64_t steps_ = 0;  // The steps that have memory.
  std::deque<ScratchMemory> blocks_;
  int64_t bytes_ = 0;     // The bytes of all blocks.
  char* next_ = nullptr;  // What is free of the last block.
  int64_t free_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_KEPT_PARTIALS_H_
