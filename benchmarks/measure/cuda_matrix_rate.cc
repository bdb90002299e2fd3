#include "benchmarks/measure/cuda_matrix_rate.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>

#include "base/dtype.h"
#include "base/status_macros.h"
#include "benchmarks/measure/timing.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/multiply_loop.h"

namespace eduba::cuda {
namespace {

constexpr int kRepeats = 4;

// These are the parts of cublas_api.h that are used. They are the same in CUDA 11 to 13.
constexpr int kCublasSuccess = 0;
constexpr int kCublasOpN = 0;
constexpr int kCudaR16Bf = 14;
constexpr int kCublasCompute32F = 68;
constexpr int kCublasGemmDefault = -1;
struct CublasApi {
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_stream)(void* handle, void* stream);
  int (*gemm_ex)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                 int type_a, int lda, const void* b, int type_b, int ldb, const void* beta, void* c,
                 int type_c, int ldc, int compute_type, int algorithm);
};

// Null where there is none.
const CublasApi* LoadCublas() {
  static const CublasApi* const loaded = []() -> const CublasApi* {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
      void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr) continue;
      static CublasApi api;
      const auto find = [&](auto& function, const char* symbol) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
        return function != nullptr;
      };
      if (find(api.create, "cublasCreate_v2") && find(api.destroy, "cublasDestroy_v2") &&
          find(api.set_stream, "cublasSetStream_v2") && find(api.gemm_ex, "cublasGemmEx")) {
        return &api;
      }
    }
    return nullptr;
  }();
  return loaded;
}

class OnStream : public MatrixRate {
 public:
  explicit OnStream(Device& device) : device_(device), memory_(device, Memory::Kind::kDevice) {}
  ~OnStream() override {
    if (stream_ != nullptr) device_.DestroyStream(stream_);
  }
  absl::Status Init(int64_t bytes) {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    EDUBA_ASSIGN_OR_RETURN(stream_, device_.CreateStream());
    return memory_.ReserveExactly(bytes);
  }
  absl::StatusOr<double> Measure() override {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(stream_));
    absl::Status status;
    const double seconds = Seconds([&] {
      for (int i = 0; i < kRepeats && status.ok(); ++i) status = Queue();
      if (status.ok()) status = device_.Synchronize(stream_);
    });
    EDUBA_RETURN_IF_ERROR(status);
    return 1e-9 * kRepeats * operations() / seconds;
  }

 protected:
  virtual absl::Status Queue() = 0;
  virtual double operations() const = 0;

  Device& device_;
  Memory memory_;
  Stream stream_ = nullptr;
};

class Cublas final : public OnStream {
 public:
  static constexpr int kSize = 8192;
  static constexpr int64_t kMatrixBytes = int64_t{kSize} * kSize * 2;

  Cublas(Device& device, const CublasApi& api) : OnStream(device), api_(api) {}
  ~Cublas() override {
    if (handle_ != nullptr) api_.destroy(handle_);
  }
  absl::Status Init() {
    EDUBA_RETURN_IF_ERROR(OnStream::Init(3 * kMatrixBytes));
    EDUBA_RETURN_IF_ERROR(FillNormalBf16(device_, stream_, memory_.data(), 2 * kMatrixBytes));
    if (api_.create(&handle_) == kCublasSuccess && api_.set_stream(handle_, stream_) == kCublasSuccess) {
      return absl::OkStatus();
    }
    return absl::UnavailableError("cuBLAS does not start");
  }
  std::string name() const override { return "cuBLAS"; }

 protected:
  absl::Status Queue() override {
    const float one = 1;
    const float zero = 0;
    char* const a = memory_.data();
    const int result = api_.gemm_ex(handle_, kCublasOpN, kCublasOpN, kSize, kSize, kSize, &one, a, kCudaR16Bf,
                                    kSize, a + kMatrixBytes, kCudaR16Bf, kSize, &zero, a + 2 * kMatrixBytes,
                                    kCudaR16Bf, kSize, kCublasCompute32F, kCublasGemmDefault);
    return result == kCublasSuccess ? absl::OkStatus() : absl::UnavailableError("cuBLAS failed");
  }
  double operations() const override { return 2.0 * kSize * kSize * kSize; }

 private:
  const CublasApi& api_;
  void* handle_ = nullptr;
};

class Loop final : public OnStream {
 public:
  Loop(Device& device, int64_t blocks, int rounds) : OnStream(device), args_{blocks, rounds, nullptr} {}
  absl::Status Init() {
    EDUBA_RETURN_IF_ERROR(OnStream::Init(args_.blocks * kLoopThreads * static_cast<int64_t>(sizeof(float))));
    args_.sum = reinterpret_cast<float*>(memory_.data());
    return absl::OkStatus();
  }
  std::string name() const override { return "mma.sync"; }

 protected:
  absl::Status Queue() override { return device_.MultiplyLoop(stream_, args_); }
  double operations() const override { return args_.operations(); }

 private:
  LoopArgs args_;
};

}  // namespace

absl::Status FillNormalBf16(Device& device, Stream stream, char* data, int64_t bytes) {
  // Drawing all of them would take seconds. No multiple of a row, so that no two rows are equal.
  constexpr int64_t kDrawn = (int64_t{1} << 20) + 7;
  constexpr int64_t kDrawnBytes = kDrawn * 2;
  Memory host(device, Memory::Kind::kHost);
  EDUBA_RETURN_IF_ERROR(host.ReserveExactly(kDrawnBytes));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < kDrawn; ++i) StoreElement(host.data(), DType::kBf16, i, normal(random));
  for (int64_t begin = 0; begin < bytes; begin += kDrawnBytes) {
    EDUBA_RETURN_IF_ERROR(
        device.CopyIn(stream, data + begin, host.data(), std::min(kDrawnBytes, bytes - begin)));
  }
  return device.Synchronize(stream);
}

absl::StatusOr<std::unique_ptr<MatrixRate>> MatrixRate::Make(Device& device) {
  // Enough for some milliseconds on any GPU; a host that emulates one must not take minutes.
  const bool is_emulated = device.is_emulated();
  if (const CublasApi* const api = is_emulated ? nullptr : LoadCublas(); api != nullptr) {
    auto rate = std::make_unique<Cublas>(device, *api);
    EDUBA_RETURN_IF_ERROR(rate->Init());
    return rate;
  }
  auto rate = std::make_unique<Loop>(device, is_emulated ? 1 : 1024, is_emulated ? 1 : 4096);
  EDUBA_RETURN_IF_ERROR(rate->Init());
  return rate;
}

}  // namespace eduba::cuda
