#include "kernels/cuda/emulated_device.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/testing/emulated_queue.h"
#include "kernels/cuda/cuda_errors.h"
#include "kernels/cuda/emulated_block.h"
#include "kernels/cuda/emulated_warpgroup.h"
#include "kernels/cuda/launch.h"

namespace eduba::cuda {
namespace {

// make(index, memory) is block number `index` over its shared memory.
template <class Make, class Kernel>
void RunBlocksOf(int64_t blocks, int64_t shared_bytes, const Make& make, const Kernel& kernel) {
  // Aligned as the device's is.
  std::vector<uint64_t> shared(shared_bytes / sizeof(uint64_t) + 3);
  void* aligned = shared.data();
  size_t space = shared.size() * sizeof(uint64_t);
  EDUBA_CHECK(std::align(16, shared_bytes, aligned, space) != nullptr);
  for (int64_t i = 0; i < blocks; ++i) {
    // NaN, and no small integer: what a block reads before it wrote it shows.
    std::memset(shared.data(), 0xff, shared.size() * sizeof(uint64_t));
    kernel(make(i, aligned));
  }
}
template <class Kernel>
void RunBlocks(int64_t blocks, int threads, int64_t shared_bytes, const Kernel& kernel) {
  RunBlocksOf(
      blocks, shared_bytes,
      [&](int64_t index, void* shared) { return EmulatedBlock(index, threads, shared); }, kernel);
}

template <class Type>
void RunWarpgroups(const AttendArgs& args) {
  const int shared_bytes = WarpgroupSpaceOf(args).bytes;
  RunBlocksOf(
      args.blocks(), shared_bytes,
      [&](int64_t index, void* shared) {
        return EmulatedGroupBlock(index, kWarpgroupThreads, shared, shared_bytes);
      },
      [&](const EmulatedGroupBlock& block) {
        GroupChannels(args.layout) == kGroupChannelsMax
            ? AttendPagesWarpgroup<Type, kGroupChannelsMax>(block, args)
            : AttendPagesWarpgroup<Type, kGroupChannelsMax / 2>(block, args);
      });
}

struct AttendLaunch {
  const AttendArgs& args;
  template <class Type, int kTile>
  void Attend() const {
    RunBlocks(args.blocks(), kAttendThreads, AttendSharedBytes(args),
              [this](const EmulatedBlock& block) { AttendPages<Type, kTile>(block, args); });
  }
};

// Calls run.template operator()<Type>() for the type of the elements.
template <class Run>
void ForElement(Element element, const Run& run) {
  if (element == Element::kF32) run.template operator()<F32>();
  if (element == Element::kBf16) run.template operator()<Bf16>();
  if (element == Element::kF16) run.template operator()<F16>();
}

class EmulatedDevice final : public Device {
 public:
  EmulatedDevice(int64_t memory_bytes, bool has_warpgroups)
      : has_warpgroups_(has_warpgroups), free_bytes_(memory_bytes) {}
  ~EmulatedDevice() override { EDUBA_CHECK(allocated_.empty() && streams_.empty()); }

  const std::string& name() const override { return name_; }
  int index() const override { return kEmulatedDeviceIndex; }
  const std::string& kind() const override { return name_; }
  const std::string& model() const override { return name_; }
  absl::Status health() const override {
    return calls_left_ > 0 ? absl::OkStatus()
                           : DeviceFailed(name_, "running kernels", "unspecified launch failure");
  }
  bool is_emulated() const override { return true; }
  absl::Status Attach() override { return health(); }
  absl::Status Fail(const std::string& /*what*/) override {
    calls_left_ = 0;
    return health();
  }

  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override {
    const MutexLock lock(mutex_);
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
    WaitForAll();
    const MutexLock lock(mutex_);
    free_bytes_ += allocated_.at(data);
    allocated_.erase(data);
    std::free(data);
  }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override {
    void* const data = std::malloc(bytes);
    std::memset(data, 0xff, bytes);
    return data;
  }
  void FreeHost(void* data) override {
    WaitForAll();
    std::free(data);
  }

  absl::StatusOr<Stream> CreateStream() override {
    const MutexLock lock(mutex_);
    return streams_.emplace_back(std::make_unique<EmulatedQueue>()).get();
  }
  absl::StatusOr<Stream> CreateUrgentStream() override {
    const MutexLock lock(mutex_);
    Stream const stream = streams_.emplace_back(std::make_unique<EmulatedQueue>()).get();
    urgent_.insert(stream);
    return stream;
  }
  void DestroyStream(Stream stream) override {
    WaitFor(*static_cast<EmulatedQueue*>(stream));
    const MutexLock lock(mutex_);
    urgent_.erase(stream);
    std::erase_if(streams_, [&](const auto& one) { return one.get() == stream; });
  }
  absl::Status Synchronize(Stream stream) override {
    if (absl::Status status = Work(); !status.ok()) return status;
    WaitFor(*static_cast<EmulatedQueue*>(stream));
    return health();
  }

  absl::Status CopyIn(Stream stream, void* device, const void* host, int64_t bytes) override {
    return Copy(stream, device, host, bytes);
  }
  absl::Status CopyOut(Stream stream, void* host, const void* device, int64_t bytes) override {
    return Copy(stream, host, device, bytes);
  }
  absl::Status CopyWithin(Stream stream, void* to, const void* from, int64_t bytes) override {
    return Copy(stream, to, from, bytes);
  }
  absl::Status Zero(Stream stream, void* data, int64_t bytes) override {
    return Queue(stream, [=] { std::memset(data, 0, bytes); });
  }

  int64_t shared_bytes_max() const override { return int64_t{96} << 10; }
  // Few, and no multiple of most numbers of heads, so that runs of pages have several lengths.
  int64_t AttendBlocksAtOnce(Element /*element*/, const AttendArgs& /*args*/) override { return 7; }
  absl::Status Attend(Stream stream, Element element, const AttendArgs& args) override {
    EDUBA_CHECK(AttendSharedBytes(args) <= shared_bytes_max());
    return QueueAttention(stream, [=] { ForAttend(element, args.tile, AttendLaunch{args}); });
  }
  absl::Status AttendTensor(Stream stream, Element element, const AttendArgs& args) override {
    return QueueAttention(stream, [=] {
      RunBlocks(args.blocks(), TensorThreads(args.tile), sizeof(TensorShared),
                [&](const EmulatedBlock& block) {
                  element == Element::kBf16 ? AttendPageTensor<Bf16>(block, args)
                                            : AttendPageTensor<F16>(block, args);
                });
    });
  }
  // There are as few as in AttendBlocksAtOnce.
  int64_t WarpgroupBlocksAtOnce() const override { return has_warpgroups_ ? 7 : 0; }
  absl::Status AttendWarpgroups(Stream stream, Element element, const AttendArgs& args) override {
    EDUBA_CHECK(has_warpgroups_);
    return QueueAttention(
        stream, [=] { element == Element::kBf16 ? RunWarpgroups<Bf16>(args) : RunWarpgroups<F16>(args); });
  }
  absl::Status Sum(Stream stream, const SumArgs& args) override {
    return QueueAttention(stream, [=] {
      RunBlocks(args.blocks(), kSumThreads, sizeof(SumShared),
                [&](const EmulatedBlock& block) { SumPages(block, args); });
    });
  }
  absl::Status MultiplyLoop(Stream stream, const LoopArgs& args) override {
    return Queue(stream, [=] {
      RunBlocks(args.blocks, kLoopThreads, 0,
                [&](const EmulatedBlock& block) { cuda::MultiplyLoop<Bf16>(block, args); });
    });
  }
  absl::Status Magnitudes(Stream stream, const MagnitudeArgs& args) override {
    return Queue(stream, [=] {
      RunBlocks(args.blocks(), kSumThreads, 0,
                [&](const EmulatedBlock& block) { RaiseMagnitudes(block, args); });
    });
  }
  absl::Status Write(Stream stream, const WriteArgs& args) override {
    {
      const MutexLock lock(mutex_);
      EDUBA_CHECK(urgent_.contains(stream));
    }
    return Queue(stream, [=] {
      RunBlocks(args.blocks(), kRowThreads, 0, [&](const EmulatedBlock& block) {
        args.layout.element == 4 ? WriteRows<uint32_t>(block, args) : WriteRows<uint16_t>(block, args);
      });
    });
  }
  absl::Status ScoreSinks(Stream stream, Element element, const SinkArgs& args) override {
    return Queue(stream, [=] {
      ForElement(element, [&]<class Type>() {
        RunBlocks(args.blocks(), kSinkThreads, sizeof(SinkShared),
                  [&](const EmulatedBlock& block) { cuda::ScoreSinks<Type>(block, args); });
      });
    });
  }
  absl::Status Finalise(Stream stream, Element element, const FinaliseArgs& args) override {
    return Queue(stream, [=] {
      ForElement(element, [&]<class Type>() {
        RunBlocks(args.blocks(), kFinaliseThreads, sizeof(FinaliseShared),
                  [&](const EmulatedBlock& block) { FinaliseRowHead<Type>(block, args); });
      });
    });
  }

  absl::Status Layer(Stream stream, const LayerOperation& operation) override {
    return Queue(stream, [=] {
      std::visit(
          [](const auto& args) {
            RunBlocks(LayerBlocks(args), kLayerThreads, sizeof(LayerShared),
                      [&](const EmulatedBlock& block) { RunLayer(block, args); });
          },
          operation);
    });
  }

  void TimeAttention() override {}
  absl::StatusOr<double> AttentionSeconds() override {
    WaitForAll();
    const MutexLock lock(mutex_);
    return std::exchange(attention_seconds_, 0);
  }

  void Break(int calls) { calls_left_ = calls; }
  void Exhaust(int calls) { calls_to_exhaustion_ = calls; }

 private:
  absl::Status Work() {
    if (calls_left_ > 0 && calls_left_ < kForEver) --calls_left_;
    return health();
  }
  template <class Body>
  absl::Status Queue(Stream stream, Body body) {
    if (absl::Status status = Work(); !status.ok()) return status;
    if (calls_to_exhaustion_ < kForEver && calls_to_exhaustion_-- == 0) {
      calls_to_exhaustion_ = kForEver;
      return OutOfMemory({name_, "starting a kernel", kCudaMemoryAllocation, "out of memory"});
    }
    static_cast<EmulatedQueue*>(stream)->Push([body = std::move(body)] {
      body();
      return true;
    });
    return absl::OkStatus();
  }
  template <class Body>
  absl::Status QueueAttention(Stream stream, Body body) {
    return Queue(stream, [this, body = std::move(body)] {
      const auto begin = std::chrono::steady_clock::now();
      body();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      const MutexLock lock(mutex_);
      attention_seconds_ += taken.count();
    });
  }
  absl::Status Copy(Stream stream, void* to, const void* from, int64_t bytes) {
    if (bytes == 0) return absl::OkStatus();  // The pointers may be null then, as on a GPU.
    return Queue(stream, [=] { std::memcpy(to, from, bytes); });
  }
  // Others may have to come first, in threads of their own. A broken device does no more work.
  void WaitFor(EmulatedQueue& stream) const {
    while (health().ok() && !stream.Run()) std::this_thread::yield();
  }
  void WaitForAll() {
    std::vector<EmulatedQueue*> streams;
    {
      const MutexLock lock(mutex_);
      for (const auto& stream : streams_) streams.push_back(stream.get());
    }
    for (EmulatedQueue* const stream : streams) WaitFor(*stream);
  }

  static constexpr int kForEver = 1 << 30;
  const std::string name_ = "cuda:emulated";
  const bool has_warpgroups_;
  std::atomic<int> calls_left_{kForEver};
  std::atomic<int> calls_to_exhaustion_{kForEver};
  Mutex mutex_;
  int64_t free_bytes_ ABSL_GUARDED_BY(mutex_);
  double attention_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<void*, int64_t> allocated_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<EmulatedQueue>> streams_ ABSL_GUARDED_BY(mutex_);
  std::set<Stream> urgent_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Device> MakeEmulatedDevice(int64_t memory_bytes, bool has_warpgroups) {
  return std::make_unique<EmulatedDevice>(memory_bytes, has_warpgroups);
}

void BreakEmulatedDevice(Device& device, int calls) { static_cast<EmulatedDevice&>(device).Break(calls); }

void ExhaustEmulatedDevice(Device& device, int calls) { static_cast<EmulatedDevice&>(device).Exhaust(calls); }

bool EmulatedDeviceRuns() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace eduba::cuda
