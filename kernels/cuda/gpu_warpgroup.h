#ifndef EDUBA_KERNELS_CUDA_GPU_WARPGROUP_H_
#define EDUBA_KERNELS_CUDA_GPU_WARPGROUP_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"
#include "kernels/cuda/gpu_block.h"

// The Block of page_warpgroup.h on sm_90a, for nvcc alone.

// Accumulators as operands of an asm, and their numbers as text: an instruction takes 32, 64 or 128 of them.
#define EDUBA_C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define EDUBA_C16(c, i) EDUBA_C4(c, i), EDUBA_C4(c, i + 1), EDUBA_C4(c, i + 2), EDUBA_C4(c, i + 3)
#define EDUBA_C32(c, i) EDUBA_C16(c, i), EDUBA_C16(c, i + 4)
#define EDUBA_C64(c, i) EDUBA_C32(c, i), EDUBA_C32(c, i + 8)
#define EDUBA_C128(c) EDUBA_C64(c, 0), EDUBA_C64(c, 16)
// clang-format off
#define EDUBA_N32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define EDUBA_N64 EDUBA_N32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define EDUBA_N128 EDUBA_N64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

namespace eduba::cuda {

class GpuWarpgroup {
 public:
  EDUBA_DEVICE explicit GpuWarpgroup(int index) : index_(index) {}
  EDUBA_DEVICE int index() const { return index_; }

  template <class Body>
  EDUBA_DEVICE void Threads(const Body& body) const {
    body(static_cast<int>(threadIdx.x) % kGroupThreads);
  }
  template <class Body>
  EDUBA_DEVICE void Warps(const Body& body) const {
    body(GroupWarp());
  }
  EDUBA_DEVICE void Sync() const {
    asm volatile("bar.sync %0, %1;" : : "r"(1 + index()), "n"(kGroupThreads) : "memory");
  }

  template <int kCount>
  EDUBA_DEVICE void TakeRegisters() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kCount));
  }
  template <int kCount>
  EDUBA_DEVICE void GiveRegisters() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kCount));
  }

  EDUBA_DEVICE void Wait(const uint64_t* barrier, uint32_t parity) const {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(at), "r"(parity)
          : "memory");
    }
  }

  template <class Type, class Of>
  EDUBA_DEVICE void MultiplyKeys(const Of& c_of, uint64_t a, uint64_t b, bool is_sum) const {
    auto& c = c_of(thread());
    static_assert(sizeof(c) == 128 * sizeof(float));
    const int sums = is_sum ? 1 : 0;
#define EDUBA_MULTIPLY(type)                                                       \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" EDUBA_N128 \
      "}, %128, %129, p, 1, 1, 0, 0;\n}"                                           \
      : EDUBA_C128(c)                                                              \
      : "l"(a), "l"(b), "r"(sums))
    if constexpr (Type::kHasFloatRange) {
      EDUBA_MULTIPLY("bf16");
    } else {
      EDUBA_MULTIPLY("f16");
    }
#undef EDUBA_MULTIPLY
  }

  template <class Type, class Of>
  EDUBA_DEVICE void MultiplyValues(const Of& operands_of, uint64_t b, bool is_sum) const {
    const auto x = operands_of(thread());
    const int sums = is_sum ? 1 : 0;
#define EDUBA_MULTIPLY(n, type, names, accumulators, a0, a1, a2, a3, descriptor, predicate)                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " predicate                                               \
               ", 0;\n"                                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a0 ", " a1 \
               ", " a2 ", " a3 "}, " descriptor ", p, 1, 1, 1;\n}"                                         \
               : accumulators                                                                              \
               : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "l"(b), "r"(sums))
#define EDUBA_MULTIPLY_64(type) \
  EDUBA_MULTIPLY("64", type, EDUBA_N32, EDUBA_C32(x.c, 0), "%32", "%33", "%34", "%35", "%36", "%37")
#define EDUBA_MULTIPLY_128(type) \
  EDUBA_MULTIPLY("128", type, EDUBA_N64, EDUBA_C64(x.c, 0), "%64", "%65", "%66", "%67", "%68", "%69")
    if constexpr (sizeof(x.c) == 32 * sizeof(float)) {
      if constexpr (Type::kHasFloatRange) {
        EDUBA_MULTIPLY_64("bf16");
      } else {
        EDUBA_MULTIPLY_64("f16");
      }
    } else {
      static_assert(sizeof(x.c) == 64 * sizeof(float));
      if constexpr (Type::kHasFloatRange) {
        EDUBA_MULTIPLY_128("bf16");
      } else {
        EDUBA_MULTIPLY_128("f16");
      }
    }
#undef EDUBA_MULTIPLY_128
#undef EDUBA_MULTIPLY_64
#undef EDUBA_MULTIPLY
  }

  EDUBA_DEVICE void FenceRegisters() const { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
  EDUBA_DEVICE void CommitProducts() const {
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  }
  template <int kPending>
  EDUBA_DEVICE void WaitForProducts() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  }
  // The compiler believes that they are there since the product was started.
  template <class Of>
  EDUBA_DEVICE void KeepProducts(const Of& c_of) const {
    auto& c = c_of(thread());
    EDUBA_UNROLL
    for (auto& tile : c) {
      EDUBA_UNROLL
      for (float& x : tile) asm volatile("" : "+f"(x) : : "memory");
    }
  }

 private:
  // Its index is the group's.
  class GroupWarp : public GpuWarp {
   public:
    EDUBA_DEVICE int index() const { return static_cast<int>(threadIdx.x) % kGroupThreads / kWarpThreads; }
  };
  EDUBA_DEVICE static int thread() { return static_cast<int>(threadIdx.x) % kGroupThreads; }

  const int index_;
};

class GpuGroupBlock : public GpuBlock {
 public:
  using GpuBlock::GpuBlock;

  EDUBA_DEVICE static int Uniform(int x) { return __shfl_sync(0xffffffffU, x, 0); }

  template <class Body>
  EDUBA_DEVICE void Groups(const Body& body) const {
    body(GpuWarpgroup(Uniform(static_cast<int>(threadIdx.x) / kGroupThreads)));
  }

  EDUBA_DEVICE uint32_t AddressOf(const void* shared) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  EDUBA_DEVICE void InitBarrier(uint64_t* barrier, int count) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :
                 : "r"(AddressOf(barrier)), "r"(count)
                 : "memory");
  }
  EDUBA_DEVICE void Expect(uint64_t* barrier, int bytes) const {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
                 :
                 : "r"(AddressOf(barrier)), "r"(bytes)
                 : "memory");
  }
  EDUBA_DEVICE void Arrive(uint64_t* barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(AddressOf(barrier)) : "memory");
  }
  EDUBA_DEVICE void CopyBulk(void* shared, const void* global, int bytes, uint64_t* barrier) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(AddressOf(shared)), "l"(global), "r"(bytes), "r"(AddressOf(barrier))
                 : "memory");
  }
  EDUBA_DEVICE void Store(int /*thread*/, void* shared, const Load16& value) const {
    *static_cast<uint4*>(shared) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
  }
  // Products and bulk copies go another way to shared memory ("proxy") than a thread's own loads and stores.
  EDUBA_DEVICE void Publish(int /*thread*/) const {
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
  }
};

}  // namespace eduba::cuda

#undef EDUBA_C4
#undef EDUBA_C16
#undef EDUBA_C32
#undef EDUBA_C64
#undef EDUBA_C128
#undef EDUBA_N32
#undef EDUBA_N64
#undef EDUBA_N128

#endif  // EDUBA_KERNELS_CUDA_GPU_WARPGROUP_H_
