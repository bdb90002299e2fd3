#include "attention/page_table.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "attention/kv_page.h"
#include "attention/page_store.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/testing/forwarding_backend.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;

AttentionShape Shape() {
  AttentionShape shape;
  shape.query_heads = shape.kv_heads = 2;
  shape.head_dim = 3;
  shape.value_dim = 5;
  return shape;
}

// Counts what pages are sealed.
class CountingBackend final : public testing::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  absl::Status SealPage(const AttentionShape& shape, void* page) override {
    sealed.push_back(page);
    return ForwardingBackend::SealPage(shape, page);
  }
  std::vector<void*> sealed;
};

class PageTableTest : public ::testing::Test {
 protected:
  // A page with rows [0, rows) of `index` written, of numbers that follow from the seed.
  std::shared_ptr<KvPage> MakePage(int64_t index, int64_t rows, int seed = 0) {
    std::shared_ptr<KvPage> page = (*writer_.Reserve(&store_, 1))[0];
    WriteRows(*page, index, 0, rows, seed);
    return page;
  }
  void WriteRows(KvPage& page, int64_t index, int64_t begin, int64_t end, int seed = 0) {
    std::mt19937 random(static_cast<unsigned>(1000 * index + begin + seed));
    std::vector<float> keys((end - begin) * 6);
    std::vector<float> values((end - begin) * 10);
    for (float& k : keys) k = static_cast<float>(random() % 100);
    for (float& v : values) v = static_cast<float>(random() % 100);
    const char* const k = reinterpret_cast<const char*>(keys.data());
    const char* const v = reinterpret_cast<const char*>(values.data());
    const Digest digest = writer_.DigestOf(0, PageBegin(index) + begin, end - begin, k, v);
    ASSERT_TRUE(writer_.Write(page, begin, end - begin, k, v, digest).ok());
  }
  std::vector<char> Rows(const KvPage& page, int64_t rows) {
    std::vector<char> keys(rows * writer_.key_bytes());
    std::vector<char> values(rows * writer_.value_bytes());
    EXPECT_TRUE(writer_.Read(page, 0, rows, keys.data(), values.data()).ok());
    keys.insert(keys.end(), values.begin(), values.end());
    return keys;
  }
  static std::vector<int64_t> Indices(absl::Span<const PageRef> refs) {
    std::vector<int64_t> indices;
    for (const PageRef& ref : refs) indices.push_back(ref.index);
    return indices;
  }

  CountingBackend backend_{MakeReferenceBackend()};
  PageStore store_{&backend_, int64_t{16} << 20};
  PageWriter writer_{&backend_, Shape()};
};

TEST_F(PageTableTest, KeepsPagesInOrderWithHolesBetweenThem) {
  PageTable table;
  for (const int64_t index : {7, 2, 4}) table.Put(index, MakePage(index, kPageRows));
  EXPECT_THAT(Indices(table.refs()), ElementsAre(2, 4, 7));
  EXPECT_EQ(table.At(3), nullptr);
  ASSERT_NE(table.At(4), nullptr);
  EXPECT_EQ(table.At(4)->memory.data(), table.refs()[1].data);
  EXPECT_THAT(Indices(table.Pages({0, PageBegin(2)})), ElementsAre());
  EXPECT_THAT(Indices(table.Pages({PageBegin(3) - 1, PageBegin(4) + 1})), ElementsAre(2, 4));
  EXPECT_THAT(Indices(table.Pages({PageBegin(5), PageBegin(9)})), ElementsAre(7));
  EXPECT_THAT(Indices(table.Pages({9, 9})), ElementsAre());
}

TEST_F(PageTableTest, TakesPagesOutAndLeavesHoles) {
  PageTable table;
  for (int64_t index = 0; index < 6; ++index) table.Put(index, MakePage(index, kPageRows));
  const auto taken = table.Take([](int64_t index) { return index % 2 == 1; });
  EXPECT_EQ(taken.size(), 3U);
  EXPECT_THAT(Indices(table.refs()), ElementsAre(0, 2, 4));
  for (const int64_t index : {0, 2, 4}) {
    EXPECT_EQ(table.At(index)->memory.data(), table.Pages({PageBegin(index), PageBegin(index) + 1})[0].data);
  }
}

TEST_F(PageTableTest, AForkSharesPagesUntilOneIsReplacedByACopy) {
  PageTable table;
  table.Put(0, MakePage(0, kPageRows));
  table.Put(1, MakePage(1, 10));
  EXPECT_FALSE(table.IsShared(1));
  PageTable fork = table;
  EXPECT_TRUE(table.IsShared(1));
  const std::vector<char> before = Rows(*table.At(1), 10);

  std::shared_ptr<KvPage> copy = (*writer_.Reserve(&store_, 1))[0];
  ASSERT_TRUE(writer_.Copy(*fork.At(1), *copy).ok());
  EXPECT_EQ(copy->written.digest, table.At(1)->written.digest);
  fork.Put(1, std::move(copy));
  WriteRows(*fork.At(1), 1, 10, 20);
  EXPECT_FALSE(table.IsShared(1));
  EXPECT_TRUE(table.IsShared(0));
  EXPECT_EQ(Rows(*table.At(1), 10), before);
  EXPECT_EQ(Rows(*fork.At(1), 10), before);
  EXPECT_NE(table.At(1)->memory.data(), fork.At(1)->memory.data());
  EXPECT_NE(fork.digest(), table.digest());
}

TEST_F(PageTableTest, DigestsOfPagesAddUpForAnyOrderOfRows) {
  PageTable whole;
  PageTable parts;
  std::vector<char> keys(2 * kPageRows * writer_.key_bytes(), 1);
  std::vector<char> values(2 * kPageRows * writer_.value_bytes(), 2);
  for (size_t i = 0; i < keys.size(); i += 4) keys[i] = static_cast<char>(i / 4);
  const auto write = [&](KvPage& page, int64_t first, int64_t count) {
    const char* const k = keys.data() + first * writer_.key_bytes();
    const char* const v = values.data() + first * writer_.value_bytes();
    ASSERT_TRUE(
        writer_.Write(page, first % kPageRows, count, k, v, writer_.DigestOf(3, first, count, k, v)).ok());
  };
  for (const int64_t index : {0, 1}) {
    whole.Put(index, (*writer_.Reserve(&store_, 1))[0]);
    parts.Put(index, (*writer_.Reserve(&store_, 1))[0]);
    write(*whole.At(index), PageBegin(index), kPageRows);
    write(*parts.At(index), PageBegin(index) + 100, kPageRows - 100);
    write(*parts.At(index), PageBegin(index), 100);
  }
  EXPECT_EQ(whole.digest(), parts.digest());
  EXPECT_EQ(whole.digest(), writer_.DigestOf(3, 0, 2 * kPageRows, keys.data(), values.data()));
  EXPECT_NE(whole.digest(), writer_.DigestOf(4, 0, 2 * kPageRows, keys.data(), values.data()));
}

TEST_F(PageTableTest, SealsEachFullPageOnce) {
  PageTable table;
  table.Put(0, MakePage(0, kPageRows));
  table.Put(1, MakePage(1, kPageRows));
  table.Put(2, MakePage(2, kPageRows - 1));
  ASSERT_TRUE(table.SealFull(writer_).ok());
  EXPECT_THAT(backend_.sealed, ElementsAre(table.At(0)->memory.data(), table.At(1)->memory.data()));
  EXPECT_FALSE(table.At(2)->sealed);
  WriteRows(*table.At(2), 2, kPageRows - 1, kPageRows);
  ASSERT_TRUE(table.SealFull(writer_).ok());
  ASSERT_TRUE(table.SealFull(writer_).ok());
  EXPECT_EQ(backend_.sealed.size(), 3U);
  EXPECT_TRUE(table.At(2)->sealed);
}

TEST_F(PageTableTest, APageOfTheStoreCanBeWrittenAgainAfterASealedOneWasGivenBack) {
  const std::shared_ptr<KvPage> neighbour = MakePage(1, 1);  // Keeps the slab, and with it the page's memory.
  {
    PageTable table;
    table.Put(0, MakePage(0, kPageRows));
    ASSERT_TRUE(table.SealFull(writer_).ok());
  }
  MakePage(0, kPageRows, 1);
}

TEST_F(PageTableTest, DeadRowsAreMaskedInThisTableAlone) {
  PageTable table;
  table.Put(0, MakePage(0, kPageRows));
  table.Put(1, MakePage(1, kPageRows));
  const Digest digest = table.digest();
  table.Mask(1, {10, 70});
  const PageTable fork = table;
  table.Mask(1, {0, 3});
  EXPECT_EQ(table.refs()[0].live, nullptr);
  const auto live = [](const PageTable& of, int64_t row) {
    return (of.refs()[1].live[row / 64] >> row % 64 & 1) != 0;
  };
  for (int64_t row = 0; row < kPageRows; ++row) {
    EXPECT_EQ(live(fork, row), row < 10 || row >= 70) << row;
    EXPECT_EQ(live(table, row), (row >= 3 && row < 10) || row >= 70) << row;
  }
  EXPECT_EQ(table.digest(), digest);
  // A copy takes the page's place, and its dead rows stay dead.
  table.Put(1, MakePage(1, kPageRows));
  EXPECT_FALSE(live(table, 2));
  // Taking another page out moves the reference, and the mask with it.
  table.Take([](int64_t index) { return index == 0; });
  EXPECT_EQ(table.refs()[0].live[1], ~uint64_t{0} << 6);
}

TEST_F(PageTableTest, NothingIsReservedWhereTheStoreHasTooFewPages) {
  const int64_t too_many = (int64_t{16} << 20) / writer_.page_bytes() + 1;
  EXPECT_TRUE(absl::IsResourceExhausted(writer_.Reserve(&store_, too_many).status()));
  EXPECT_EQ(store_.used_bytes(), 0);
}

TEST(RowMask, HasTheRowsBetweenItsEnds) {
  for (const auto& [begin, end] : {std::pair{0, 0}, {0, 256}, {63, 65}, {64, 128}, {200, 201}, {256, 256}}) {
    const RowMask mask = RowsBetween(begin, end);
    for (int row = 0; row < kPageRows; ++row) {
      EXPECT_EQ((mask[row / 64] >> row % 64 & 1) != 0, row >= begin && row < end)
          << begin << " " << end << " " << row;
    }
  }
}

}  // namespace
}  // namespace eduba
