#include "attention/page_store.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

// Slabs only, counted, with an end to the memory.
class SlabBackend : public Backend {
 public:
  std::string name() const override { return "slabs"; }
  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override {
    if (bytes_ + bytes > limit) return absl::ResourceExhaustedError("the device is full");
    bytes_ += bytes;
    ++slabs_;
    if (!descending) return std::aligned_alloc(64, bytes);
    if (arena_ == nullptr) arena_.reset(static_cast<char*>(std::aligned_alloc(64, kArenaBytes)));
    below_ -= bytes;
    return arena_.get() + below_;
  }
  void FreeSlab(void* slab, int64_t bytes) override {
    bytes_ -= bytes;
    --slabs_;
    if (!descending) std::free(slab);
  }
  int64_t PageBytes(const AttentionShape&) const override { return 64; }
  absl::Status ResetPage(void*) override { return absl::OkStatus(); }
  absl::Status SealPage(const AttentionShape&, void*) override { return absl::UnimplementedError(""); }
  absl::Status WriteRows(const AttentionShape&, void*, int, int, const void*, const void*) override {
    return absl::UnimplementedError("");
  }
  absl::Status ReadRows(const AttentionShape&, const void*, int, int, void*, void*) override {
    return absl::UnimplementedError("");
  }
  absl::Status CopyPage(const AttentionShape&, const void*, void*) override {
    return absl::UnimplementedError("");
  }
  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs&) override {
    return absl::UnimplementedError("");
  }

  int64_t limit = INT64_MAX;
  bool descending = false;  // Every slab lies before the one that came before it.
  int64_t bytes() const { return bytes_; }
  int64_t slabs() const { return slabs_; }

 private:
  static constexpr int64_t kArenaBytes = int64_t{16} << 20;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  int64_t bytes_ = 0;
  int64_t slabs_ = 0;
  std::unique_ptr<char, Free> arena_;
  int64_t below_ = kArenaBytes;
};

TEST(PageStore, GivesDistinctPagesAndTakesThemBack) {
  SlabBackend backend;
  PageStore store(&backend, int64_t{1} << 20);
  {
    auto pages = store.Reserve(4096, 100);
    ASSERT_TRUE(pages.ok()) << pages.status();
    std::set<void*> distinct;
    for (const Page& page : *pages) {
      distinct.insert(page.data());
      EXPECT_EQ(reinterpret_cast<uintptr_t>(page.data()) % 64, 0u);
      std::memset(page.data(), 0xab, 4096);
    }
    EXPECT_EQ(distinct.size(), 100u);
    EXPECT_EQ(store.used_bytes(), 409600);
  }
  EXPECT_EQ(store.used_bytes(), 0);
  EXPECT_EQ(backend.bytes(), 0);
}

TEST(PageStore, TheWholeBudgetCanBeUsedAndNotAPageMore) {
  SlabBackend backend;
  PageStore store(&backend, 1000 * 4096 + 100);
  auto most = store.Reserve(4096, 999);
  ASSERT_TRUE(most.ok());
  auto last = store.Reserve(4096, 1);
  ASSERT_TRUE(last.ok()) << last.status();
  const auto more = store.Reserve(4096, 1);
  EXPECT_EQ(more.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(more.status().message()),
              HasSubstr("needs 1 pages of 4096 bytes, 100 of 4096100 bytes free"));
}

TEST(PageStore, ARefusalTakesNothing) {
  SlabBackend backend;
  PageStore store(&backend, 100 * 4096);
  auto some = store.Reserve(4096, 10);
  const int64_t before = backend.bytes();
  EXPECT_EQ(store.Reserve(4096, 91).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(store.Reserve(64, int64_t{1} << 60).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend.bytes(), before);
  EXPECT_EQ(store.used_bytes(), 10 * 4096);
  EXPECT_TRUE(store.Reserve(4096, 90).ok());
}

TEST(PageStore, ReservedBytesAndPagesShareTheBudget) {
  SlabBackend backend;
  PageStore store(&backend, 1000 * 4096);
  auto reserved = store.ReserveBytes(400 * 4096 - 1);
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  EXPECT_EQ(store.used_bytes(), 400 * 4096 - 1);
  EXPECT_EQ(backend.bytes(), 0);
  {
    auto pages = store.Reserve(4096, 600);
    ASSERT_TRUE(pages.ok()) << pages.status();
    EXPECT_EQ(store.Reserve(4096, 1).status().code(), absl::StatusCode::kResourceExhausted);
    auto last = store.ReserveBytes(1);
    ASSERT_TRUE(last.ok()) << last.status();
    const auto more = store.ReserveBytes(1);
    EXPECT_EQ(more.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(more.status().message()), HasSubstr("needs 1 bytes, 0 of 4096000 bytes free"));
    *reserved = ReservedBytes();
    EXPECT_EQ(store.used_bytes(), 600 * 4096 + 1);
    EXPECT_TRUE(store.Reserve(4096, 399).ok());
  }
  EXPECT_EQ(store.ReserveBytes(INT64_MAX).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(store.ReserveBytes(1000 * 4096).ok());
  EXPECT_EQ(store.used_bytes(), 0);
}

TEST(PageStore, AFullDeviceLeavesNoSlabBehind) {
  SlabBackend backend;
  backend.limit = int64_t{3} << 20;
  PageStore store(&backend, int64_t{1} << 30);
  const auto pages = store.Reserve(4096, 1 << 14);
  EXPECT_EQ(pages.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(pages.status().message()), HasSubstr("the device is full"));
  EXPECT_EQ(backend.bytes(), 0);
  EXPECT_EQ(store.used_bytes(), 0);
}

TEST(PageStore, SlabsGrowWithTheirUse) {
  SlabBackend backend;
  PageStore store(&backend, int64_t{1} << 30);
  {
    auto one = store.Reserve(4096, 1);
    EXPECT_EQ(backend.bytes(), PageStore::kSlabBytesMin);
    auto many = store.Reserve(4096, (int64_t{256} << 20) / 4096);
    EXPECT_LT(backend.slabs(), 32);
    EXPECT_LE(backend.bytes(), (int64_t{256} << 20) + PageStore::kSlabBytesMax + PageStore::kSlabBytesMin);
  }
  EXPECT_EQ(backend.bytes(), 0);
}

TEST(PageStore, ASlabWithoutAPageInUseGoesBackWhereverItLies) {
  SlabBackend backend;
  backend.descending = true;
  PageStore store(&backend, int64_t{1} << 30);
  // Slabs of 64, 64, 128, 256 and 512 pages; the first one is not needed in the end.
  const auto pages = store.Reserve(4096, 960);
  ASSERT_TRUE(pages.ok());
  EXPECT_EQ(backend.slabs(), 4);
  EXPECT_EQ(backend.bytes(), 960 * 4096);
}

TEST(PageStore, APageLargerThanASlabIsItsOwnSlab) {
  SlabBackend backend;
  PageStore store(&backend, int64_t{1} << 30);
  const int64_t bytes = 2 * PageStore::kSlabBytesMax + 64;
  auto pages = store.Reserve(bytes, 3);
  ASSERT_TRUE(pages.ok());
  EXPECT_EQ(backend.bytes(), 3 * bytes);
}

TEST(PageStore, RandomUseByManyThreadsEndsWithNothingHeld) {
  SlabBackend backend;
  PageStore store(&backend, int64_t{8} << 20);
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&store, t] {
      std::mt19937 random(t);
      std::vector<std::vector<Page>> held;
      for (int i = 0; i < 500; ++i) {
        if (random() % 2 == 0 && !held.empty()) {
          held.erase(held.begin() + static_cast<int64_t>(random() % held.size()));
          continue;
        }
        auto pages = store.Reserve(64 << (random() % 6), static_cast<int64_t>(random() % 300));
        if (!pages.ok()) continue;
        for (const Page& page : *pages) std::memset(page.data(), t, 64);
        held.push_back(*std::move(pages));
      }
      for (const auto& pages : held) {
        for (const Page& page : pages) ASSERT_EQ(*static_cast<char*>(page.data()), t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(store.used_bytes(), 0);
  EXPECT_EQ(backend.bytes(), 0);
}

}  // namespace
}  // namespace eduba
