#include "storage/node_storage.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kFingerprint = 0x1234;

class NodeStorageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "/node_storage_",
                        ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::unique_ptr<NodeStorage> Open() const {
    auto storage = NodeStorage::Open(dir_, kFingerprint);
    EXPECT_TRUE(storage.ok()) << storage.status();
    return *std::move(storage);
  }
  absl::Status OpenError(uint64_t fingerprint = kFingerprint) const {
    return NodeStorage::Open(dir_, fingerprint).status();
  }
  std::string Description() const { return dir_ + "/content/description"; }

  std::string dir_;
};

TEST_F(NodeStorageTest, SessionsAreThereAgainUntilTheyAreErased) {
  {
    const auto storage = Open();
    EXPECT_FALSE(storage->cluster());
    ASSERT_EQ(storage->Enter(0xabcdef, {1, 5}), absl::OkStatus());
    ASSERT_EQ(storage->Create(12, std::string("any\0bytes\n", 10)), absl::OkStatus());
    ASSERT_EQ(storage->Create(3, ""), absl::OkStatus());
  }
  const auto storage = Open();
  EXPECT_EQ(storage->cluster(), 0xabcdefU);
  EXPECT_THAT(*storage->Sessions(), ElementsAre(3, 12));
  EXPECT_EQ(*storage->Descriptor(12), std::string("any\0bytes\n", 10));
  EXPECT_EQ(*storage->Descriptor(3), "");
  storage->Erase(12);
  storage->Erase(99);
  EXPECT_THAT(*storage->Sessions(), ElementsAre(3));
  EXPECT_FALSE(std::filesystem::exists(storage->FolderOf(12)));
  EXPECT_THAT(*Open()->Sessions(), ElementsAre(3));
}

// A session that was being made or removed when the machine stopped.
TEST_F(NodeStorageTest, WhatWasBeingRemovedIsRemovedByTheNextStart) {
  const auto storage = Open();
  ASSERT_EQ(storage->Enter(1, {1, 5}), absl::OkStatus());
  ASSERT_EQ(storage->Create(5, "five"), absl::OkStatus());
  std::filesystem::rename(storage->FolderOf(5), dir_ + "/content/removed-5");
  EXPECT_THAT(*Open()->Sessions(), IsEmpty());
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/content/removed-5"));
}

TEST_F(NodeStorageTest, OnlyTheOwnerCanReadIt) {
  const auto storage = Open();
  ASSERT_EQ(storage->Enter(1, {1, 5}), absl::OkStatus());
  ASSERT_EQ(storage->Create(5, "five"), absl::OkStatus());
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir_)) {
    struct stat info {};
    ASSERT_EQ(stat(entry.path().c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 077, 0U) << entry.path();
  }
}

TEST_F(NodeStorageTest, AnotherClusterOrArithmeticIsRefusedAndChangesNothing) {
  const auto storage = Open();
  ASSERT_EQ(storage->Enter(7, {1, 5}), absl::OkStatus());
  ASSERT_EQ(storage->Enter(7, {1, 5}), absl::OkStatus());
  ASSERT_EQ(storage->Create(5, "five"), absl::OkStatus());
  const absl::Status cluster = storage->Enter(8, {1, 5});
  EXPECT_EQ(cluster.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster.message()), HasSubstr("another coordinator's records"));
  EXPECT_EQ(storage->cluster(), 7U);
  const absl::Status arithmetic = OpenError(0x99);
  EXPECT_EQ(arithmetic.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(arithmetic.message()),
              HasSubstr("arithmetic 0000000000001234, and this worker's is 0000000000000099"));
  EXPECT_EQ(*Open()->Descriptor(5), "five");
}

TEST_F(NodeStorageTest, AnEarlierTermIsRefusedAndALaterOneRemembered) {
  ASSERT_EQ(Open()->Enter(7, {3, 33}), absl::OkStatus());
  const auto storage = Open();
  EXPECT_EQ(storage->obeyed(), (ObeyedTerm{3, 33}));
  for (const ObeyedTerm& term : {ObeyedTerm{2, 33}, ObeyedTerm{3, 34}, ObeyedTerm{}}) {
    EXPECT_EQ(storage->Enter(7, term).code(), absl::StatusCode::kFailedPrecondition);
  }
  ASSERT_EQ(storage->Enter(7, {3, 33}), absl::OkStatus());
  ASSERT_EQ(storage->Enter(7, {5, 1}), absl::OkStatus());
  EXPECT_EQ(Open()->obeyed(), (ObeyedTerm{5, 1}));
}

TEST_F(NodeStorageTest, DamageIsNamedAndNeverTakenForAnEmptyFolder) {
  {
    const auto storage = Open();
    ASSERT_EQ(storage->Enter(7, {1, 5}), absl::OkStatus());
    ASSERT_EQ(storage->Create(5, "five"), absl::OkStatus());
  }
  std::string bytes;
  {
    std::ifstream file(Description(), std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(file), {});
  }
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    std::ofstream(Description(), std::ios::binary | std::ios::trunc) << damaged;
    ASSERT_EQ(OpenError().code(), absl::StatusCode::kDataLoss) << bit;
  }
  for (size_t size = 0; size < bytes.size(); ++size) {
    std::ofstream(Description(), std::ios::binary | std::ios::trunc) << bytes.substr(0, size);
    ASSERT_EQ(OpenError().code(), absl::StatusCode::kDataLoss) << size;
  }
  std::filesystem::remove(Description());
  EXPECT_EQ(OpenError().code(), absl::StatusCode::kDataLoss);
  std::ofstream(Description(), std::ios::binary | std::ios::trunc) << bytes;
  std::ofstream(Open()->FolderOf(5) + "/session", std::ios::app) << "x";
  EXPECT_EQ(Open()->Descriptor(5).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace eduba
