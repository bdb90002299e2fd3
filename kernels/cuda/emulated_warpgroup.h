#ifndef EDUBA_KERNELS_CUDA_EMULATED_WARPGROUP_H_
#define EDUBA_KERNELS_CUDA_EMULATED_WARPGROUP_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/mutex.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/emulated_block.h"
#include "kernels/cuda/fragments.h"

// The Block of page_warpgroup.h, emulated by a host. Each warpgroup has a thread of its own, but one runs at
// a time, until it has to wait for a barrier. What a GPU does on its own happens as late as it can: a bulk
// copy lands when no group can go on without it, a product is made when it is waited for. Their targets are
// spoiled until then, and what a product reads has to be the same when it is started and when it is made. So
// whoever uses something too early, writes over it too early, or waits for the wrong phase gets NaN, or ends
// the process.
namespace eduba::cuda {

// Where a descriptor says that elements of 16 bits lie, in bytes of shared memory: the PTX ISA's canonical
// layouts without swizzling, which are in elements, 8 of them in 16 bytes:
//   K-major   ((8,m),(T,2k)):((1T,SBO),(1,LBO))
//   MN-major  ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
// `i` is a row of a or a column of b.
struct DescribedMatrix {
  explicit DescribedMatrix(uint64_t descriptor)
      : start(static_cast<int>(descriptor & 0x3fff) * 16),
        leading(static_cast<int>(descriptor >> 16 & 0x3fff) * 8),
        stride(static_cast<int>(descriptor >> 32 & 0x3fff) * 8) {
    // The rest is 0 for a matrix that is not swizzled.
    EDUBA_CHECK_EQ(descriptor & ~uint64_t{0x00003fff3fff3fff}, uint64_t{0});
  }
  int KMajor(int i, int depth) const {
    return start + 2 * (i % 8 * 8 + i / 8 * stride + depth % 8 + depth / 8 * leading);
  }
  int MnMajor(int i, int depth) const {
    return start + 2 * (i % 8 + i / 8 * stride + depth % 8 * 8 + depth / 8 * leading);
  }

  int start;    // Bytes.
  int leading;  // Elements.
  int stride;
};

// A block's shared memory, as descriptors name it.
class EmulatedShared {
 public:
  EmulatedShared(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}

  uint32_t AddressOf(const void* at) const {
    const int64_t offset = static_cast<const char*>(at) - data_;
    EDUBA_CHECK(offset >= 0 && offset < bytes_);
    return static_cast<uint32_t>(offset + kBase);
  }
  uint16_t ElementAt(int address) const {
    EDUBA_CHECK(address >= kBase && address + 2 <= kBase + bytes_);
    uint16_t element;
    std::memcpy(&element, data_ + address - kBase, sizeof(element));
    return element;
  }
  void CheckRoom(const void* at, int bytes) const {
    EDUBA_CHECK(AddressOf(at) % 16 == 0 && AddressOf(at) + bytes <= kBase + bytes_);
  }

 private:
  static constexpr int kBase = 1024;  // Not 0, as on a GPU.
  char* const data_;
  const int64_t bytes_;
};

// Barriers, bulk copies, and whose turn it is.
class GroupSchedule {
 public:
  GroupSchedule() = default;
  // What is under way when a block ends lands in another's memory.
  ~GroupSchedule() { EDUBA_CHECK(copies_.empty()); }
  GroupSchedule(const GroupSchedule&) = delete;
  GroupSchedule& operator=(const GroupSchedule&) = delete;

  void Init(const void* barrier, int count) { barriers_[barrier] = {count, count, 0, 0}; }
  void Expect(const void* barrier, int bytes) { barriers_.at(barrier).bytes += bytes; }
  void Arrive(const void* barrier) {
    Barrier& b = barriers_.at(barrier);
    EDUBA_CHECK(b.missing > 0);
    --b.missing;
    Turn(b);
  }
  void Copy(void* to, const void* from, int bytes, const void* barrier) {
    EDUBA_CHECK(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0);
    EDUBA_CHECK(barriers_.contains(barrier));
    std::memset(to, 0xff, bytes);
    copies_.push_back({to, from, bytes, barrier});
  }

  // group(i) for each group, from number `first` on, until all have ended.
  template <class Group>
  void Run(int groups, int first, const Group& group) {
    waits_.assign(groups, Waited{});
    is_done_.assign(groups, 0);
    now_ = first % groups;
    std::vector<std::thread> threads;
    threads.reserve(groups);
    for (int i = 0; i < groups; ++i) {
      threads.emplace_back([this, i, &group] {
        const MutexLock lock(mutex_);
        while (now_ != i) turn_.Wait(mutex_);
        group(i);
        is_done_[i] = 1;
        Pass();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // The group that runs calls this, and it holds the mutex. It calls through pieces of kernels that know of
  // no lock, so the compiler cannot see that.
  void Wait(int group, const void* barrier, uint32_t parity) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    waits_[group] = {barrier, parity};
    if (!IsOver(waits_[group])) {
      Pass();
      while (now_ != group) turn_.Wait(mutex_);
    }
    waits_[group] = {};
  }

 private:
  struct Barrier {
    int count;
    int missing;    // Arrivals of the phase under way.
    int64_t bytes;  // Expected, less those that came.
    uint32_t parity;
  };
  struct Waited {
    const void* barrier = nullptr;
    uint32_t parity = 0;
  };
  struct BulkCopy {
    void* to;
    const void* from;
    int bytes;
    const void* barrier;
  };

  static void Turn(Barrier& b) {
    if (b.missing > 0 || b.bytes != 0) return;
    b.missing = b.count;
    b.parity ^= 1;
  }
  // Does what mbarrier.try_wait.parity does: the phase of this parity is over when one of the other is under
  // way.
  bool IsOver(const Waited& waited) const {
    return waited.barrier == nullptr || barriers_.at(waited.barrier).parity != waited.parity;
  }
  void Pass() {
    const int groups = static_cast<int>(waits_.size());
    while (std::find(is_done_.begin(), is_done_.end(), 0) != is_done_.end()) {
      for (int k = 1; k <= groups; ++k) {
        const int next = (now_ + k) % groups;
        if (is_done_[next] != 0 || !IsOver(waits_[next])) continue;
        now_ = next;
        turn_.NotifyAll();
        return;
      }
      EDUBA_CHECK(!copies_.empty());  // Or the groups wait for each other.
      const BulkCopy copy = copies_.back();
      copies_.pop_back();
      std::memcpy(copy.to, copy.from, copy.bytes);
      Barrier& b = barriers_.at(copy.barrier);
      b.bytes -= copy.bytes;
      Turn(b);
    }
  }

  std::map<const void*, Barrier> barriers_;
  std::vector<BulkCopy> copies_;
  Mutex mutex_;  // Held by whoever runs.
  CondVar turn_;
  int now_ = 0;
  std::vector<Waited> waits_;
  std::vector<char> is_done_;
};

class EmulatedWarpgroup {
 public:
  EmulatedWarpgroup(int index, GroupSchedule& schedule, const EmulatedShared& shared)
      : index_(index), schedule_(schedule), shared_(shared) {}
  ~EmulatedWarpgroup() { EDUBA_CHECK(open_.empty() && committed_.empty()); }
  EmulatedWarpgroup(const EmulatedWarpgroup&) = delete;
  EmulatedWarpgroup& operator=(const EmulatedWarpgroup&) = delete;

  int index() const { return index_; }

  template <class Body>
  void Threads(const Body& body) const {
    for (int t = 0; t < kGroupThreads; ++t) body(t);
  }
  template <class Body>
  void Warps(const Body& body) const {
    for (int w = 0; w < kGroupWarps; ++w) body(EmulatedWarp(w));
  }
  void Sync() const {}
  template <int kCount>
  void TakeRegisters() const {}
  template <int kCount>
  void GiveRegisters() const {}
  void Wait(const void* barrier, uint32_t parity) const { schedule_.Wait(index_, barrier, parity); }

  template <class Type, class Of>
  void MultiplyKeys(const Of& c_of, uint64_t a, uint64_t b, bool is_sum) const {
    Product product = MakeProduct<Type>(c_of, is_sum);
    product.read = [this, a, b](Bits& rows, Bits& columns) {
      const DescribedMatrix matrix_a(a);
      const DescribedMatrix matrix_b(b);
      for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] = shared_.ElementAt(matrix_a.KMajor(static_cast<int>(i) / kTileDepth, i % kTileDepth));
      }
      for (size_t i = 0; i < columns.size(); ++i) {
        columns[i] = shared_.ElementAt(matrix_b.KMajor(static_cast<int>(i) / kTileDepth, i % kTileDepth));
      }
    };
    Start(std::move(product));
  }
  template <class Type, class Of>
  void MultiplyValues(const Of& operands_of, uint64_t b, bool is_sum) const {
    Product product = MakeProduct<Type>(
        [&](int t) -> auto& { return operands_of(t).c; }, is_sum);
    std::vector<const uint32_t*> a(kGroupThreads);
    for (int t = 0; t < kGroupThreads; ++t) a[t] = operands_of(t).a;
    product.read = [this, a, b](Bits& rows, Bits& columns) {
      for (int t = 0; t < kGroupThreads; ++t) {
        const int lane = t % kWarpThreads;
        for (int i = 0; i < 8; ++i) {
          const int row = t / kWarpThreads * kTileRows + lane / 4 + i / 2 % 2 * 8;
          const int depth = lane % 4 * 2 + i % 2 + i / 4 * 8;
          rows[row * kTileDepth + depth] = static_cast<uint16_t>(a[t][i / 2] >> (i % 2 * 16));
        }
      }
      const DescribedMatrix matrix(b);
      for (size_t i = 0; i < columns.size(); ++i) {
        columns[i] = shared_.ElementAt(matrix.MnMajor(static_cast<int>(i) / kTileDepth, i % kTileDepth));
      }
    };
    Start(std::move(product));
  }

  void FenceRegisters() const { is_fenced_ = true; }
  void CommitProducts() const {
    committed_.push_back(std::move(open_));
    open_.clear();
    is_fenced_ = false;
  }
  template <int kPending>
  void WaitForProducts() const {
    for (; committed_.size() > kPending; committed_.pop_front()) {
      for (const Product& product : committed_.front()) Make(product);
    }
  }
  template <class Of>
  void KeepProducts(const Of& c_of) const {
    EDUBA_CHECK(!held_.contains(&c_of(0)[0][0]));
  }

 private:
  using Bits = std::vector<uint16_t>;
  struct Product {
    std::vector<float*> c;  // Each thread's: [tiles][4]
    int tiles = 0;
    bool is_sum = false;
    float (*value)(uint16_t) = nullptr;
    std::function<void(Bits&, Bits&)> read;  // a [64][16], and b [columns][16]
    Bits rows;
    Bits columns;
  };
  // Accumulators of products under way; their registers are spoiled.
  struct Held {
    std::vector<std::vector<float>> c;
    int products = 0;
  };

  template <class Type, class Of>
  static Product MakeProduct(const Of& c_of, bool is_sum) {
    Product product;
    for (int t = 0; t < kGroupThreads; ++t) product.c.push_back(&c_of(t)[0][0]);
    product.tiles = static_cast<int>(std::size(c_of(0)));
    product.is_sum = is_sum;
    product.value = [](uint16_t bits) { return Type::Value(bits); };
    product.rows.resize(kGroupTileRows * kTileDepth);
    product.columns.resize(product.tiles * kTileColumns * kTileDepth);
    return product;
  }

  void Start(Product product) const {
    EDUBA_CHECK(is_fenced_);
    product.read(product.rows, product.columns);
    const size_t count = size_t{4} * product.tiles;
    Held& held = held_[product.c[0]];
    if (held.products++ == 0) {
      for (float* const c : product.c) {
        held.c.emplace_back(c, c + count);
        std::memset(c, 0xff, count * sizeof(float));
      }
    }
    open_.push_back(std::move(product));
  }

  void Make(const Product& product) const {
    Bits rows = product.rows;
    Bits columns = product.columns;
    product.read(rows, columns);
    EDUBA_CHECK(rows == product.rows && columns == product.columns);  // Changed under way.
    Held& held = held_.at(product.c[0]);
    const int width = product.tiles * kTileColumns;
    std::vector<double> b(columns.size());  // [16][width]
    bool is_finite = true;
    for (int column = 0; column < width; ++column) {
      for (int d = 0; d < kTileDepth; ++d) {
        const float x = product.value(columns[column * kTileDepth + d]);
        is_finite &= IsFinite(x);
        b[d * width + column] = x;
      }
    }
    std::vector<double> sum(width);
    for (int row = 0; row < kGroupTileRows; ++row) {
      const auto at = [&](int column) -> float& {
        const int t = row / kTileRows * kWarpThreads + row % 8 * 4 + column % 8 / 2;
        return held.c[t][column / 8 * 4 + row % kTileRows / 8 * 2 + column % 2];
      };
      const auto first = rows.begin() + row * kTileDepth;
      // Zeros add nothing: most rows of a test's tiles are empty.
      if (product.is_sum && is_finite &&
          std::all_of(first, first + kTileDepth, [](uint16_t x) { return x == 0; })) {
        continue;
      }
      for (int column = 0; column < width; ++column) sum[column] = product.is_sum ? at(column) : 0;
      for (int d = 0; d < kTileDepth; ++d) {
        const double a = product.value(first[d]);
        for (int column = 0; column < width; ++column) sum[column] += a * b[d * width + column];
        if (d % 8 != 7) continue;
        for (int column = 0; column < width; ++column) sum[column] = CutOff(sum[column]);
      }
      for (int column = 0; column < width; ++column) at(column) = static_cast<float>(sum[column]);
    }
    if (--held.products > 0) return;
    for (size_t t = 0; t < product.c.size(); ++t) {
      // Whoever wrote to them under way has lost it.
      for (size_t i = 0; i < held.c[t].size(); ++i) {
        EDUBA_CHECK_EQ(std::bit_cast<uint32_t>(product.c[t][i]), 0xffffffffU);
      }
      std::copy(held.c[t].begin(), held.c[t].end(), product.c[t]);
    }
    held_.erase(product.c[0]);
  }

  const int index_;
  GroupSchedule& schedule_;
  const EmulatedShared& shared_;
  mutable bool is_fenced_ = false;
  mutable std::vector<Product> open_;
  mutable std::deque<std::vector<Product>> committed_;
  mutable std::map<const float*, Held> held_;
};

class EmulatedGroupBlock : public EmulatedBlock {
 public:
  EmulatedGroupBlock(int64_t index, int threads, void* shared, int64_t shared_bytes)
      : EmulatedBlock(index, threads, shared), memory_(shared, shared_bytes), stored_(threads) {}

  static int Uniform(int x) { return x; }
  // Who is first differs from block to block.
  template <class Body>
  void Groups(const Body& body) const {
    schedule_.Run(threads() / kGroupThreads, static_cast<int>(index() % threads()),
                  [&](int i) { body(EmulatedWarpgroup(i, schedule_, memory_)); });
  }

  uint32_t AddressOf(const void* shared) const { return memory_.AddressOf(shared); }
  void InitBarrier(uint64_t* barrier, int count) const { schedule_.Init(barrier, count); }
  void Expect(uint64_t* barrier, int bytes) const { schedule_.Expect(barrier, bytes); }
  void Arrive(uint64_t* barrier) const { schedule_.Arrive(barrier); }
  void CopyBulk(void* shared, const void* global, int bytes, uint64_t* barrier) const {
    memory_.CheckRoom(shared, bytes);
    schedule_.Copy(shared, global, bytes, barrier);
  }

  // Products see it when it was published, and not before.
  void Store(int thread, void* shared, const Load16& value) const {
    memory_.CheckRoom(shared, sizeof(value));
    std::memset(shared, 0xff, sizeof(value));
    stored_[thread].emplace_back(shared, value);
  }
  template <int kPending>
  void WaitForCopies(int thread) const {
    FinishCopies<kPending>(thread, [&](void* to, const void* from) {
      Load16 value = {};
      if (from != nullptr) std::memcpy(&value, from, sizeof(value));
      stored_[thread].emplace_back(to, value);
    });
  }
  void Publish(int thread) const {
    for (const auto& [to, value] : stored_[thread]) std::memcpy(to, &value, sizeof(value));
    stored_[thread].clear();
  }

 private:
  const EmulatedShared memory_;
  mutable GroupSchedule schedule_;
  mutable std::vector<std::vector<std::pair<void*, Load16>>> stored_;  // What each thread has stored.
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_EMULATED_WARPGROUP_H_
