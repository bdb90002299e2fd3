#ifndef EDUBA_KERNELS_CUDA_EMULATED_BLOCK_H_
#define EDUBA_KERNELS_CUDA_EMULATED_BLOCK_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/fragments.h"

// The Block of page_attention.h and the Warp of page_tensor.h, emulated by one thread of a host.
namespace eduba::cuda {

// How NVIDIA's tensor cores add up, as far as it was found out (Fasi, Higham, Mikaitis and Pranesh,
// "Numerical behavior of NVIDIA tensor cores", 2021): products exact, 8 of them and the sum so far at a time,
// cut off, not rounded. A real one may cut a bit more or less: nothing relies on these bits.
inline float CutOff(double x) {
  const auto nearest = static_cast<float>(x);
  if (!std::isfinite(nearest) || std::abs(static_cast<double>(nearest)) <= std::abs(x)) return nearest;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1);
}

class EmulatedWarp {
 public:
  explicit EmulatedWarp(int index) : index_(index) {}
  int index() const { return index_; }
  void Sync() const {}

  template <class Body>
  void Lanes(const Body& body) const {
    for (int lane = 0; lane < kWarpThreads; ++lane) body(lane);
  }

  template <class Type, class Operands>
  void Multiply(const Operands& operands) const {
    double a[kTileRows][kTileDepth];
    double b[kTileDepth][kTileColumns];
    double c[kTileRows][kTileColumns];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const MatrixOperands x = operands(lane);
      const int group = lane / 4;
      const int pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8] = Type::Low(x.a[i]);
        a[group + i % 2 * 8][pair + i / 2 * 8 + 1] = Type::High(x.a[i]);
        c[group + i / 2 * 8][pair + i % 2] = x.c[i];
      }
      for (int i = 0; i < 2; ++i) {
        b[pair + i * 8][group] = Type::Low(x.b[i]);
        b[pair + i * 8 + 1][group] = Type::High(x.b[i]);
      }
    }
    for (int row = 0; row < kTileRows; ++row) {
      for (int first = 0; first < kTileDepth; first += 8) {
        for (int d = first; d < first + 8; ++d) {
          for (int column = 0; column < kTileColumns; ++column) c[row][column] += a[row][d] * b[d][column];
        }
        for (int column = 0; column < kTileColumns; ++column) c[row][column] = CutOff(c[row][column]);
      }
    }
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const MatrixOperands x = operands(lane);
      for (int i = 0; i < 4; ++i) {
        x.c[i] = static_cast<float>(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      }
    }
  }

  template <class RowOf, class To>
  void LoadTransposed(const RowOf& row_of, const To& to) const {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      uint32_t(&x)[2][2] = to(lane);
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[2];
        for (int i = 0; i < 2; ++i) {
          const char* const row = row_of(matrix * 8 + lane % 4 * 2 + i);
          std::memcpy(&element[i], row + lane / 4 * sizeof(uint16_t), sizeof(uint16_t));
        }
        x[matrix / 2][matrix % 2] = element[0] | static_cast<uint32_t>(element[1]) << 16;
      }
    }
  }

  template <class Of>
  void QuadMax(const Of& of) const {
    for (int first = 0; first < kWarpThreads; first += 4) {
      float largest = of(first);
      for (int i = 1; i < 4; ++i) largest = of(first + i) > largest ? of(first + i) : largest;
      for (int i = 0; i < 4; ++i) of(first + i) = largest;
    }
  }
  template <class Of>
  void QuadSum(const Of& of) const {
    for (int first = 0; first < kWarpThreads; first += 4) {
      const float sum = Add(Add(of(first), of(first + 1)), Add(of(first + 2), of(first + 3)));
      for (int i = 0; i < 4; ++i) of(first + i) = sum;
    }
  }

 private:
  const int index_;
};

class EmulatedBlock {
 public:
  template <class T>
  class Registers {
   public:
    explicit Registers(const EmulatedBlock& block) : all_(block.threads()) {
      std::memset(static_cast<void*>(all_.data()), 0xff, all_.size() * sizeof(T));
    }
    T& operator[](int thread) { return all_[thread]; }

   private:
    std::vector<T> all_;
  };

  EmulatedBlock(int64_t index, int threads, void* shared)
      : index_(index), threads_(threads), shared_(static_cast<float*>(shared)) {}

  int64_t index() const { return index_; }
  int threads() const { return threads_; }
  float* shared() const { return shared_; }

  template <class Phase>
  void Threads(const Phase& phase) const {
    for (int t = 0; t < threads_; ++t) phase(t);
  }
  template <class Body>
  void Warps(const Body& body) const {
    for (int w = 0; w < threads_ / kWarpThreads; ++w) body(EmulatedWarp(w));
  }

  // The destination is spoiled at once and written at the last moment: a copy that comes before its place is
  // free, or that is used before it was waited for, shows either way.
  void CopyAsync(int thread, void* shared, const void* global, bool is_copied) const {
    std::memset(shared, 0xff, kCopyBytes);
    CopiesOf(thread).open.push_back({shared, is_copied ? global : nullptr});
  }
  void CommitCopies(int thread) const {
    Copies& copies = CopiesOf(thread);
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  }
  template <int kPending>
  void WaitForCopies(int thread) const {
    FinishCopies<kPending>(thread, [](void* to, const void* from) {
      if (from == nullptr) {
        std::memset(to, 0, kCopyBytes);
      } else {
        std::memcpy(to, from, kCopyBytes);
      }
    });
  }

 protected:
  // land(to, from), `from` null for zeros, for each copy of all groups but the last ones.
  template <int kPending, class Land>
  void FinishCopies(int thread, const Land& land) const {
    auto& groups = CopiesOf(thread).groups;
    for (; groups.size() > kPending; groups.pop_front()) {
      for (const Copy& copy : groups.front()) land(copy.to, copy.from);
    }
  }

 private:
  static constexpr int kCopyBytes = 16;
  struct Copy {
    void* to;
    const void* from;  // Null: zeros.
  };
  struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };
  Copies& CopiesOf(int thread) const {
    if (copies_.empty()) copies_.resize(threads_);
    return copies_[thread];
  }

  const int64_t index_;
  const int threads_;
  float* const shared_;
  mutable std::vector<Copies> copies_;  // Each thread's copies; empty where nobody copies.
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_EMULATED_BLOCK_H_
