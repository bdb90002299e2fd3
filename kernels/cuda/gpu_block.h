#ifndef EDUBA_KERNELS_CUDA_GPU_BLOCK_H_
#define EDUBA_KERNELS_CUDA_GPU_BLOCK_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"

// The Block of page_attention.h and the Warp of page_tensor.h on a GPU, for nvcc alone. Everything is
// inlined: a Registers is registers, a Lanes its body.
namespace eduba::cuda {

class GpuWarp {
 public:
  EDUBA_DEVICE int index() const { return static_cast<int>(threadIdx.x) / kWarpThreads; }
  EDUBA_DEVICE void Sync() const { __syncwarp(); }

  template <class Body>
  EDUBA_DEVICE void Lanes(const Body& body) const {
    body(lane());
  }

  template <class Type, class Operands>
  EDUBA_DEVICE void Multiply(const Operands& operands) const {
    const MatrixOperands x = operands(lane());
    if constexpr (Type::kHasFloatRange) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(x.c[0]), "+f"(x.c[1]), "+f"(x.c[2]), "+f"(x.c[3])
          : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "r"(x.b[0]), "r"(x.b[1]));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(x.c[0]), "+f"(x.c[1]), "+f"(x.c[2]), "+f"(x.c[3])
          : "r"(x.a[0]), "r"(x.a[1]), "r"(x.a[2]), "r"(x.a[3]), "r"(x.b[0]), "r"(x.b[1]));
    }
  }

  template <class RowOf, class To>
  EDUBA_DEVICE void LoadTransposed(const RowOf& row_of, const To& to) const {
    const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row_of(lane())));
    uint32_t(&x)[2][2] = to(lane());
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1])
                 : "r"(from)
                 : "memory");
  }

  template <class Of>
  EDUBA_DEVICE void QuadMax(const Of& of) const {
    float& x = of(lane());
    EDUBA_UNROLL
    for (int step = 1; step <= 2; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffU, x, step);
      x = other > x ? other : x;
    }
  }
  template <class Of>
  EDUBA_DEVICE void QuadSum(const Of& of) const {
    float& x = of(lane());
    EDUBA_UNROLL
    for (int step = 1; step <= 2; step *= 2) x = Add(x, __shfl_xor_sync(0xffffffffU, x, step));
  }

 private:
  EDUBA_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
};

class GpuBlock {
 public:
  template <class T>
  class Registers {
   public:
    EDUBA_DEVICE explicit Registers(const GpuBlock& /*block*/) {}
    EDUBA_DEVICE T& operator[](int /*thread*/) { return mine_; }

   private:
    T mine_;
  };

  EDUBA_DEVICE explicit GpuBlock(float4* shared) : shared_(reinterpret_cast<float*>(shared)) {}
  EDUBA_DEVICE int64_t index() const { return blockIdx.x; }
  EDUBA_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  EDUBA_DEVICE float* shared() const { return shared_; }

  template <class Phase>
  EDUBA_DEVICE void Threads(const Phase& phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class Body>
  EDUBA_DEVICE void Warps(const Body& body) const {
    body(GpuWarp());
  }

  EDUBA_DEVICE void CopyAsync(int /*thread*/, void* shared, const void* global, bool is_copied) const {
    const int bytes = is_copied ? kLoadBytes : 0;  // The rest is zeros.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes)
                 : "memory");
  }
  EDUBA_DEVICE void CommitCopies(int /*thread*/) const {
    asm volatile("cp.async.commit_group;" : : : "memory");
  }
  template <int kPending>
  EDUBA_DEVICE void WaitForCopies(int /*thread*/) const {
    asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
  }

 private:
  static constexpr int kLoadBytes = 16;
  float* const shared_;
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_GPU_BLOCK_H_
