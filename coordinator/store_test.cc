#include "coordinator/store.h"

#include <sqlite3.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace eduba {
namespace {

class StoreTest : public testing::Test {
 protected:
  StoreTest() {
    std::string name = (std::filesystem::temp_directory_path() / "store_test_XXXXXX").string();
    dir_ = mkdtemp(name.data());
  }
  ~StoreTest() override { std::filesystem::remove_all(dir_); }

  std::string File() const { return dir_ + "/coordinator.sqlite"; }
  void RunSql(const char* sql) {
    sqlite3* db = nullptr;
    ASSERT_EQ(sqlite3_open(File().c_str(), &db), SQLITE_OK);
    ASSERT_EQ(sqlite3_exec(db, sql, nullptr, nullptr, nullptr), SQLITE_OK) << sqlite3_errmsg(db);
    sqlite3_close(db);
  }
  absl::StatusCode OpenCode() { return Store::Open(dir_).status().code(); }

  std::string dir_;
};

SessionRecord Atlas(uint64_t id) {
  SessionRecord session;
  session.id = id;
  session.name = "atlas" + std::to_string(id);
  session.spec.set_head_dim(64);
  session.spec.set_notes(std::string("a\0b", 3));
  session.created_unix_ms = 1234567890123;
  return session;
}

TEST_F(StoreTest, KeepsWhatWasApplied) {
  const Digest digest{~uint64_t{0}, uint64_t{1} << 63};  // beyond SQLite's signed integers
  {
    auto store = Store::Open(dir_);
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_TRUE((*store)->Apply(EpochBegun{7}).ok());
    EXPECT_TRUE((*store)->Apply(SessionCreated{Atlas(1)}).ok());
    EXPECT_TRUE((*store)->Apply(SessionCreated{Atlas(2)}).ok());
    EXPECT_TRUE((*store)->Apply(AppendCommitted{2, {0, 300, digest}}).ok());
    EXPECT_TRUE((*store)->Apply(AppendCommitted{2, {300, 5, {}}}).ok());
    EXPECT_TRUE((*store)->Apply(SessionErased{1}).ok());
  }
  auto store = Store::Open(dir_);
  ASSERT_TRUE(store.ok()) << store.status();
  const auto state = (*store)->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->epoch, 7);
  EXPECT_EQ(state->next_session_id, 3);
  ASSERT_EQ(state->sessions.size(), 1);
  const SessionRecord& session = state->sessions[0];
  EXPECT_EQ(session.id, 2);
  EXPECT_EQ(session.name, "atlas2");
  EXPECT_EQ(session.spec.notes(), std::string("a\0b", 3));
  EXPECT_EQ(session.created_unix_ms, 1234567890123);
  EXPECT_EQ(session.length(), 305);
  ASSERT_EQ(session.appends.size(), 2);
  EXPECT_EQ(session.appends[0], (AppendRecord{0, 300, digest}));
}

TEST_F(StoreTest, ErasingASessionErasesItsAppendsAndKeepsItsIdUsed) {
  auto store = Store::Open(dir_);
  ASSERT_TRUE(store.ok());
  ASSERT_TRUE((*store)->Apply(SessionCreated{Atlas(1)}).ok());
  ASSERT_TRUE((*store)->Apply(AppendCommitted{1, {0, 300, {}}}).ok());
  ASSERT_TRUE((*store)->Apply(SessionErased{1}).ok());
  EXPECT_EQ((*store)->Load()->next_session_id, 2);
  // The same key again would fail if the old rows were still there.
  ASSERT_TRUE((*store)->Apply(SessionCreated{Atlas(1)}).ok());
  EXPECT_TRUE((*store)->Apply(AppendCommitted{1, {0, 300, {}}}).ok());
}

TEST_F(StoreTest, AFailedChangeStoresNothingAndTheNextOneWorks) {
  auto store = Store::Open(dir_);
  ASSERT_TRUE(store.ok());
  ASSERT_TRUE((*store)->Apply(SessionCreated{Atlas(1)}).ok());
  SessionRecord same_name = Atlas(5);
  same_name.name = "atlas1";
  EXPECT_FALSE((*store)->Apply(SessionCreated{same_name}).ok());
  EXPECT_FALSE((*store)->Apply(AppendCommitted{99, {0, 1, {}}}).ok());
  EXPECT_EQ((*store)->Load()->next_session_id, 2);
  EXPECT_TRUE((*store)->Apply(SessionCreated{Atlas(2)}).ok());
  EXPECT_EQ((*store)->Load()->sessions.size(), 2);
}

TEST_F(StoreTest, ASecondCoordinatorIsRefused) {
  auto store = Store::Open(dir_);
  ASSERT_TRUE(store.ok());
  EXPECT_EQ(OpenCode(), absl::StatusCode::kFailedPrecondition);
  store->reset();
  EXPECT_EQ(OpenCode(), absl::StatusCode::kOk);
}

TEST_F(StoreTest, ANewerSchemaIsRefused) {
  ASSERT_EQ(OpenCode(), absl::StatusCode::kOk);
  RunSql("PRAGMA user_version = 99");
  EXPECT_EQ(OpenCode(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StoreTest, AnotherProgramsFileIsRefusedAndLeftAsItIs) {
  RunSql("CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)");
  EXPECT_EQ(OpenCode(), absl::StatusCode::kDataLoss);
  RunSql("SELECT x FROM theirs");
}

TEST_F(StoreTest, ADamagedFileIsSaid) {
  std::ofstream(File()) << std::string(4096, 'x');
  EXPECT_EQ(OpenCode(), absl::StatusCode::kDataLoss);
}

TEST_F(StoreTest, AnImpossibleDirectoryIsSaid) {
  EXPECT_EQ(Store::Open("/proc/none/here").status().code(), absl::StatusCode::kUnavailable);
}

TEST(MemoryStore, ForgetsWithTheProcess) {
  auto store = Store::Open("");
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE((*store)->Apply(SessionCreated{Atlas(1)}).ok());
  EXPECT_EQ((*store)->Load()->sessions.size(), 1);
  EXPECT_EQ((*Store::Open(""))->Load()->sessions.size(), 0);
}

}  // namespace
}  // namespace eduba
