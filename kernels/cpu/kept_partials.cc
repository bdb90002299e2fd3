#include "kernels/cpu/kept_partials.h"

#include <algorithm>

namespace eduba {

float* KeptPartials::Take(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > most_) return nullptr;
  if (steps_ == 0 && (blocks_.size() != 1 || bytes > bytes_)) {
    const int64_t wanted = std::max(bytes, bytes_);
    blocks_.clear();
    bytes_ = free_ = 0;
    if (!AddBlock(wanted)) return nullptr;
  } else if (steps_ == 0) {
    next_ += free_ - bytes_;
    free_ = bytes_;
  }
  if (bytes > free_ && !AddBlock(bytes)) return nullptr;
  auto* const memory = reinterpret_cast<float*>(next_);
  next_ += bytes;
  free_ -= bytes;
  ++steps_;
  return memory;
}

bool KeptPartials::AddBlock(int64_t bytes) {
  if (bytes > most_ - bytes_) return false;
  void* const memory = blocks_.emplace_back().Reserve(bytes);
  if (memory == nullptr) {
    blocks_.pop_back();
    return false;
  }
  bytes_ += bytes;
  next_ = static_cast<char*>(memory);
  free_ = bytes;
  return true;
}

}  // namespace eduba
