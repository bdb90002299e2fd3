#include "kernels/cuda/emulated_device.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cuda/emulated_block.h"
#include "kernels/cuda/launch.h"

namespace eduba::cuda {
namespace {

template <class Kernel>
void RunBlocks(int64_t blocks, int threads, int64_t shared_bytes, const Kernel& kernel) {
  // Aligned as the device's is.
  std::vector<uint64_t> shared(shared_bytes / sizeof(uint64_t) + 3);
  void* aligned = shared.data();
  size_t space = shared.size() * sizeof(uint64_t);
  EDUBA_CHECK(std::align(16, shared_bytes, aligned, space) != nullptr);
  for (int64_t i = 0; i < blocks; ++i) {
    // NaN, and no small integer: what a block reads before it wrote it shows.
    std::memset(shared.data(), 0xff, shared.size() * sizeof(uint64_t));
    kernel(EmulatedBlock(i, threads, aligned));
  }
}

struct AttendLaunch {
  const AttendArgs& args;
  template <class Type, int kTile>
  void Attend() const {
    RunBlocks(args.blocks(), kAttendThreads, AttendSharedBytes(args),
              [this](const EmulatedBlock& block) { AttendPage<Type, kTile>(block, args); });
  }
};

class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(int64_t memory_bytes) : free_bytes_(memory_bytes) {}
  ~EmulatedDevice() override { EDUBA_CHECK(allocated_.empty()); }

  const std::string& name() const override { return name_; }
  const std::string& kind() const override { return name_; }
  absl::Status health() const override {
    return calls_left_ > 0 ? absl::OkStatus()
                           : absl::UnavailableError("cuda:emulated: unspecified launch failure");
  }
  bool is_played() const override { return true; }
  absl::Status Attach() override { return health(); }

  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override {
    const std::scoped_lock lock(mutex_);
    if (bytes > free_bytes_) {
      return absl::ResourceExhaustedError(
          absl::StrCat(name_, ": no memory for ", bytes, " bytes, ", free_bytes_, " are free"));
    }
    void* const data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(data, 0xff, bytes);
    free_bytes_ -= bytes;
    allocated_[data] = bytes;
    return data;
  }
  void FreeDevice(void* data) override {
    const std::scoped_lock lock(mutex_);
    free_bytes_ += allocated_.at(data);
    allocated_.erase(data);
    std::free(data);
  }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override { return std::malloc(bytes); }
  void FreeHost(void* data) override { std::free(data); }

  absl::StatusOr<Stream> CreateStream() override { return this; }
  void DestroyStream(Stream /*stream*/) override {}
  absl::Status Synchronize(Stream /*stream*/) override { return Work(); }

  absl::Status CopyIn(Stream /*stream*/, void* device, const void* host, int64_t bytes) override {
    return Copy(device, host, bytes);
  }
  absl::Status CopyOut(Stream /*stream*/, void* host, const void* device, int64_t bytes) override {
    return Copy(host, device, bytes);
  }
  absl::Status CopyWithin(Stream /*stream*/, void* to, const void* from, int64_t bytes) override {
    return Copy(to, from, bytes);
  }
  absl::Status Zero(Stream /*stream*/, void* data, int64_t bytes) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    std::memset(data, 0, bytes);
    return absl::OkStatus();
  }

  int64_t shared_bytes_max() const override { return int64_t{96} << 10; }
  absl::Status Attend(Stream /*stream*/, Element element, const AttendArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    EDUBA_CHECK(AttendSharedBytes(args) <= shared_bytes_max());
    ForAttend(element, args.tile, AttendLaunch{args});
    return absl::OkStatus();
  }
  absl::Status AttendTensor(Stream /*stream*/, Element element, const AttendArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks(), TensorThreads(args.tile), sizeof(TensorShared), [&](const EmulatedBlock& block) {
      element == Element::kBf16 ? AttendPageTensor<Bf16>(block, args) : AttendPageTensor<F16>(block, args);
    });
    return absl::OkStatus();
  }
  absl::Status Sum(Stream /*stream*/, const SumArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks(), kSumThreads, sizeof(SumShared),
              [&](const EmulatedBlock& block) { SumPages(block, args); });
    return absl::OkStatus();
  }
  absl::Status MultiplyLoop(Stream /*stream*/, const LoopArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks, kLoopThreads, 0,
              [&](const EmulatedBlock& block) { cuda::MultiplyLoop<Bf16>(block, args); });
    return absl::OkStatus();
  }
  absl::Status Magnitudes(Stream /*stream*/, const MagnitudeArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks(), kSumThreads, 0,
              [&](const EmulatedBlock& block) { RaiseMagnitudes(block, args); });
    return absl::OkStatus();
  }
  absl::Status Write(Stream /*stream*/, const WriteArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks(), kRowThreads, 0, [&](const EmulatedBlock& block) {
      args.layout.element == 4 ? WriteRows<uint32_t>(block, args) : WriteRows<uint16_t>(block, args);
    });
    return absl::OkStatus();
  }
  absl::Status Read(Stream /*stream*/, Element element, const ReadArgs& args) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    RunBlocks(args.blocks(), kRowThreads, 0, [&](const EmulatedBlock& block) {
      if (element == Element::kF32) ReadRows<F32>(block, args);
      if (element == Element::kBf16) ReadRows<Bf16>(block, args);
      if (element == Element::kF16) ReadRows<F16>(block, args);
    });
    return absl::OkStatus();
  }

  void Break(int calls) { calls_left_ = calls; }

 private:
  absl::Status Work() {
    if (calls_left_ > 0 && calls_left_ < kForEver) --calls_left_;
    return health();
  }
  absl::Status Copy(void* to, const void* from, int64_t bytes) {
    if (absl::Status status = Work(); !status.ok()) return status;
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  }

  static constexpr int kForEver = 1 << 30;
  const std::string name_ = "cuda:emulated";
  std::atomic<int> calls_left_{kForEver};
  std::mutex mutex_;
  int64_t free_bytes_;                  // Guarded by mutex_.
  std::map<void*, int64_t> allocated_;  // Guarded by mutex_.
};

}  // namespace

std::unique_ptr<Device> MakeEmulatedDevice(int64_t memory_bytes) {
  return std::make_unique<EmulatedDevice>(memory_bytes);
}

void BreakEmulatedDevice(Device& device, int calls) { static_cast<EmulatedDevice&>(device).Break(calls); }

bool EmulatedDeviceRuns() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace eduba::cuda
