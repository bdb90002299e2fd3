#ifndef EDUBA_KERNELS_CUDA_DEVICE_MEMORY_H_
#define EDUBA_KERNELS_CUDA_DEVICE_MEMORY_H_

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "base/status_macros.h"
#include "kernels/cuda/device.h"

namespace eduba::cuda {

// One block of the device's memory, or of page-locked host memory, that grows when more is asked for. What
// was in it is lost then, so nothing may be queued that uses it.
class Memory {
 public:
  enum class Kind { kDevice, kHost };
  Memory(Device& device, Kind kind) : device_(device), kind_(kind) {}
  ~Memory() { Free(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // At least so many bytes, and more than are needed now, so that growing ends soon.
  absl::Status Reserve(int64_t bytes) {
    return bytes <= bytes_ ? absl::OkStatus() : ReserveExactly(std::max<int64_t>(bytes + bytes / 2, 4096));
  }
  absl::Status ReserveExactly(int64_t size) {
    Free();
    if (kind_ == Kind::kDevice) {
      EDUBA_ASSIGN_OR_RETURN(data_, device_.AllocateDevice(size));
    } else {
      EDUBA_ASSIGN_OR_RETURN(data_, device_.AllocateHost(size));
    }
    bytes_ = size;
    return absl::OkStatus();
  }

  char* data() const { return static_cast<char*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  void Free() {
    if (data_ == nullptr) return;
    kind_ == Kind::kDevice ? device_.FreeDevice(data_) : device_.FreeHost(data_);
    data_ = nullptr;
    bytes_ = 0;
  }

  Device& device_;
  const Kind kind_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The two ends of a copy between host and device.
struct Staging {
  explicit Staging(Device& owner) : host(owner, Memory::Kind::kHost), device(owner, Memory::Kind::kDevice) {}
  absl::Status Reserve(int64_t bytes) {
    EDUBA_RETURN_IF_ERROR(host.Reserve(bytes));
    return device.Reserve(bytes);
  }
  Memory host;
  Memory device;
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_DEVICE_MEMORY_H_
