#include "worker/node_identity.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class NodeIdentityTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/node_identity_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string Kept() const {
    std::ifstream file(dir_ + "/node_id");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }

  std::string dir_;
};

TEST_F(NodeIdentityTest, IsRandomWithoutAFolderAndWithoutAnId) {
  const auto a = NodeIdentity::Open("", "");
  const auto b = NodeIdentity::Open("", "");
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_THAT(a->id(), MatchesRegex("[0-9a-f]{16}"));
  EXPECT_NE(a->id(), b->id());
  EXPECT_EQ(NodeIdentity::Open("shelf-3.left_A", "")->id(), "shelf-3.left_A");
}

TEST_F(NodeIdentityTest, IsKeptInItsFolder) {
  std::string id;
  {
    const auto first = NodeIdentity::Open("", dir_ + "/deep");
    ASSERT_TRUE(first.ok()) << first.status();
    id = first->id();
  }
  EXPECT_EQ(NodeIdentity::Open("", dir_ + "/deep")->id(), id);
  EXPECT_EQ(NodeIdentity::Open(id, dir_ + "/deep")->id(), id);
  struct stat info = {};
  ASSERT_EQ(stat((dir_ + "/deep/node_id").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/deep/node_id.part"));
}

TEST_F(NodeIdentityTest, AGivenIdIsKeptAndNoOtherIsTakenLater) {
  ASSERT_TRUE(NodeIdentity::Open("a", dir_).ok());
  EXPECT_EQ(Kept(), "a\n");
  EXPECT_EQ(NodeIdentity::Open("", dir_)->id(), "a");
  const absl::Status other = NodeIdentity::Open("b", dir_).status();
  EXPECT_EQ(other.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.message()), HasSubstr("is that of node a, and this worker is to be node b"));
  EXPECT_EQ(Kept(), "a\n");
}

TEST_F(NodeIdentityTest, AFolderHasOneLiveWorker) {
  {
    auto first = NodeIdentity::Open("", dir_);
    ASSERT_TRUE(first.ok());
    const NodeIdentity moved = *std::move(first);  // The lock moves too.
    const absl::Status second = NodeIdentity::Open("", dir_).status();
    EXPECT_EQ(second.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(second.message()), HasSubstr("another worker that runs has data folder"));
    EXPECT_THAT(std::string(second.message()), ::testing::Not(HasSubstr("\n")));
  }
  EXPECT_TRUE(NodeIdentity::Open("", dir_).ok());
}

TEST_F(NodeIdentityTest, RefusesWhatIsNoId) {
  for (const std::string& wrong :
       {std::string("a b"), std::string("a/b"), std::string("ä"), std::string("a\n"), std::string(65, 'a')}) {
    EXPECT_EQ(NodeIdentity::Open(wrong, "").status().code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
  EXPECT_TRUE(NodeIdentity::Open(std::string(64, 'a'), "").ok());
}

TEST_F(NodeIdentityTest, ADamagedFileIsNotReplaced) {
  std::filesystem::create_directories(dir_);
  for (const char* const damaged : {"", "two words\n"}) {
    std::ofstream(dir_ + "/node_id") << damaged;
    EXPECT_EQ(NodeIdentity::Open("", dir_).status().code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(Kept(), damaged);
  }
}

TEST_F(NodeIdentityTest, AFolderThatCannotBeMadeIsSaid) {
  std::ofstream(dir_) << "a file";
  EXPECT_EQ(NodeIdentity::Open("", dir_ + "/in").status().code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::remove(dir_);
}

}  // namespace
}  // namespace eduba
