#include "coordinator/store.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rpc/placement.h"
#include "rpc/spec.h"
#include "sqlite3.h"

namespace eduba {
namespace {

class StoreTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::path(testing::TempDir()) /
           testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::unique_ptr<Store> Open() {
    auto store = Store::Open(dir_);
    EXPECT_TRUE(store.ok()) << store.status();
    return store.ok() ? *std::move(store) : nullptr;
  }
  std::string path() const { return (dir_ / "eduba.db").string(); }
  void Sql(const char* sql) {
    sqlite3* db = nullptr;
    ASSERT_EQ(sqlite3_open(path().c_str(), &db), SQLITE_OK);
    ASSERT_EQ(sqlite3_exec(db, sql, nullptr, nullptr, nullptr), SQLITE_OK) << sqlite3_errmsg(db);
    sqlite3_close(db);
  }

  static SessionRecord Session(uint64_t id, const std::string& name) {
    SessionRecord session;
    session.id = id;
    session.name = name;
    v1::SessionSpec spec;
    spec.set_query_heads(4);
    spec.set_kv_heads(2);
    spec.set_head_dim(8);
    spec.set_notes("line\nwith \"quotes\"");
    session.spec = *CompleteSpec(spec);
    session.created_unix_ms = 1234567890123;
    session.placement = Placement::OfRanks(3, 64, 2);
    return session;
  }

  std::filesystem::path dir_;
};

TEST_F(StoreTest, KeepsEverythingOverARestart) {
  const AppendRecord first{0, 10, {~uint64_t{0}, uint64_t{1} << 63}};
  const AppendRecord second{10, 5, {7, 8}};
  {
    const auto store = Open();
    ASSERT_TRUE(store->Apply(EpochBegun{41}).ok());
    ASSERT_TRUE(store->Apply(SessionCreated{Session(3, "a")}).ok());
    ASSERT_TRUE(store->Apply(SessionCreated{Session(4, "b")}).ok());
    ASSERT_TRUE(store->Apply(AppendCommitted{3, first}).ok());
    ASSERT_TRUE(store->Apply(AppendCommitted{3, second}).ok());
  }
  const auto state = Open()->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->epoch, 41);
  EXPECT_EQ(state->next_session_id, 5);
  ASSERT_EQ(state->sessions.size(), 2);
  const SessionRecord& session = state->sessions[0];
  EXPECT_EQ(session.name, "a");
  EXPECT_EQ(session.created_unix_ms, 1234567890123);
  EXPECT_EQ(session.spec.SerializeAsString(), Session(3, "a").spec.SerializeAsString());
  EXPECT_THAT(session.appends, testing::ElementsAre(first, second));
  EXPECT_EQ(session.length(), 15);
  EXPECT_EQ(session.placement, Placement::OfRanks(3, 64, 2));
  EXPECT_EQ(state->sessions[1].length(), 0);
}

TEST_F(StoreTest, AnErasedSessionTakesItsAppendsAndKeepsItsIdUsed) {
  {
    const auto store = Open();
    ASSERT_TRUE(store->Apply(SessionCreated{Session(1, "a")}).ok());
    ASSERT_TRUE(store->Apply(AppendCommitted{1, {0, 10, {}}}).ok());
    ASSERT_TRUE(store->Apply(SessionErased{1}).ok());
  }
  const auto state = Open()->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(state->sessions.empty());
  EXPECT_EQ(state->next_session_id, 2);
}

TEST_F(StoreTest, ARefusedChangeLeavesNothingBehind) {
  const auto store = Open();
  ASSERT_TRUE(store->Apply(SessionCreated{Session(1, "a")}).ok());
  EXPECT_FALSE(store->Apply(SessionCreated{Session(2, "a")}).ok());
  EXPECT_FALSE(store->Apply(AppendCommitted{9, {0, 1, {}}}).ok());
  const auto state = store->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->sessions.size(), 1);
  EXPECT_EQ(state->next_session_id, 2);
  EXPECT_TRUE(store->Apply(AppendCommitted{1, {0, 1, {}}}).ok());
}

TEST_F(StoreTest, ManyChangesAreWrittenTogetherAndABadOneFailsAlone) {
  const auto store = Open();
  const std::vector<absl::Status> statuses =
      store->ApplyAll({EpochBegun{3}, SessionCreated{Session(1, "a")}, AppendCommitted{9, {0, 1, {}}},
                       AppendCommitted{1, {0, 4, {}}}});
  ASSERT_EQ(statuses.size(), 4);
  EXPECT_TRUE(statuses[0].ok() && statuses[1].ok() && statuses[3].ok());
  EXPECT_FALSE(statuses[2].ok());
  for (const absl::Status& status : store->ApplyAll({EpochBegun{4}, AppendCommitted{1, {4, 2, {}}}})) {
    EXPECT_TRUE(status.ok()) << status;
  }
  const auto state = store->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->epoch, 4);
  EXPECT_EQ(state->sessions[0].length(), 6);
}

TEST_F(StoreTest, ASessionMayBePlacedAnew) {
  const Placement other = [] {
    Placement placement = Placement::OfRanks(2, 64, 1);
    placement.version = 2;
    return placement;
  }();
  {
    const auto store = Open();
    ASSERT_TRUE(store->Apply(SessionCreated{Session(1, "a")}).ok());
    ASSERT_TRUE(store->Apply(SessionPlaced{1, other}).ok());
    ASSERT_TRUE(store->Apply(SessionPlaced{7, other}).ok());  // It was erased meanwhile.
  }
  EXPECT_EQ(Open()->Load()->sessions[0].placement, other);
}

TEST_F(StoreTest, AClusterKeepsItsNumberAndOthersHaveAnother) {
  const uint64_t cluster = Open()->Load()->cluster;
  EXPECT_EQ(Open()->Load()->cluster, cluster);
  EXPECT_NE((*Store::Open(""))->Load()->cluster, cluster);
  EXPECT_NE((*Store::Open(""))->Load()->cluster, (*Store::Open(""))->Load()->cluster);
}

TEST_F(StoreTest, TakesOverTheFirstSchemaWithoutPlacements) {
  std::filesystem::create_directories(dir_);
  const std::string spec = Session(2, "old").spec.SerializeAsString();
  const std::string old =
      absl::StrCat("INSERT INTO sessions VALUES (2, 'old', x'", absl::BytesToHexString(spec), "', 9)");
  Sql("CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;"
      "CREATE TABLE sessions (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, spec BLOB NOT NULL,"
      " created_unix_ms INTEGER NOT NULL);"
      "CREATE TABLE appends (session_id INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,"
      " at INTEGER NOT NULL, count INTEGER NOT NULL, digest_low INTEGER NOT NULL, digest_high INTEGER NOT "
      "NULL,"
      " PRIMARY KEY (session_id, at)) WITHOUT ROWID;"
      "INSERT INTO meta VALUES ('epoch', 5), ('next_session_id', 8);"
      "INSERT INTO appends VALUES (2, 0, 4, 5, 6);"
      "PRAGMA user_version = 1; PRAGMA application_id = 1164211554");
  Sql(old.c_str());
  {
    const auto store = Open();
    ASSERT_NE(store, nullptr);
    const auto state = store->Load();
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->epoch, 5);
    EXPECT_NE(state->cluster, 0);
    ASSERT_TRUE(store->Apply(SessionCreated{Session(8, "new")}).ok());
  }
  const auto state = Open()->Load();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->sessions[1].name, "new");
  EXPECT_TRUE(state->sessions[0].placement.nodes.empty());
  EXPECT_EQ(state->sessions[0].length(), 4);
}

TEST_F(StoreTest, LetsOnlyOneCoordinatorIn) {
  Open().reset();
  const auto store = Open();
  const auto second = Store::Open(dir_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable) << second.status();
  EXPECT_THAT(std::string(second.status().message()), testing::HasSubstr("another coordinator"));
}

TEST_F(StoreTest, RefusesANewerSchema) {
  Open().reset();
  Sql("PRAGMA user_version = 99");
  EXPECT_EQ(Store::Open(dir_).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StoreTest, RefusesAnotherProgramsDatabase) {
  std::filesystem::create_directories(dir_);
  Sql("CREATE TABLE music (title TEXT)");
  const auto store = Store::Open(dir_);
  EXPECT_EQ(store.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(store.status().message()), testing::HasSubstr("another program"));
}

TEST_F(StoreTest, RefusesAFolderThatCannotBe) {
  std::ofstream(dir_) << "a file";
  EXPECT_EQ(Store::Open(dir_ / "sub").status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StoreTest, RefusesAFileThatIsNoDatabase) {
  std::filesystem::create_directories(dir_);
  std::ofstream(path()) << std::string(8192, 'x');
  EXPECT_EQ(Store::Open(dir_).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(StoreTest, RefusesRecordsThatMakeNoSense) {
  {
    const auto store = Open();
    ASSERT_TRUE(store->Apply(SessionCreated{Session(1, "a")}).ok());
  }
  for (const char* change : {"INSERT INTO appends VALUES (1, 5, 5, 0, 0, 0)",
                             "UPDATE sessions SET placement = x'ff'", "UPDATE sessions SET name = 'b'",
                             "UPDATE meta SET value = 7 WHERE key = 'epoch'", "DELETE FROM sessions"}) {
    const std::string copy = path() + ".copy";
    std::filesystem::copy_file(path(), copy, std::filesystem::copy_options::overwrite_existing);
    ASSERT_TRUE(Open()->Load().ok());
    Sql(change);
    EXPECT_EQ(Open()->Load().status().code(), absl::StatusCode::kDataLoss) << change;
    std::filesystem::copy_file(copy, path(), std::filesystem::copy_options::overwrite_existing);
  }
}

// SQLite itself takes a changed number or letter as it is.
TEST_F(StoreTest, AFlippedBitIsFoundOrChangesNothing) {
  {
    const auto store = Open();
    ASSERT_TRUE(store->BeginTerm().ok());
    for (uint64_t id = 1; id <= 20; ++id) {
      ASSERT_TRUE(store->Apply(SessionCreated{Session(id, absl::StrCat("session", id))}).ok());
      for (int64_t at = 0; at < 30; at += 10) {
        ASSERT_TRUE(store->Apply(AppendCommitted{id, {at, 10, {id, 77}}}).ok());
      }
    }
  }
  const auto text = [](const StoredState& state) {
    std::string all = absl::StrCat(state.cluster, " ", state.epoch, " ", state.next_session_id, " ",
                                   state.terms.back().nonce);
    for (const SessionRecord& session : state.sessions) {
      absl::StrAppend(&all, "\n", session.id, session.name, session.spec.SerializeAsString(),
                      session.created_unix_ms, PlacementToProto(session.placement).SerializeAsString());
      for (const AppendRecord& append : session.appends) {
        absl::StrAppend(&all, " ", append.at, " ", append.count, " ", append.digest.low, " ",
                        append.digest.high);
      }
    }
    return all;
  };
  const std::string want = text(*Open()->Load());
  std::ifstream file(path(), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::mt19937_64 random(1);
  int found = 0;
  for (int i = 0; i < 1000; ++i) {
    std::string damaged = bytes;
    const size_t bit = random() % (8 * bytes.size());
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    std::ofstream(path(), std::ios::binary | std::ios::trunc) << damaged;
    const auto store = Store::Open(dir_);
    const auto state = store.ok() ? (*store)->Load() : store.status();
    if (!state.ok()) {
      ++found;
    } else {
      EXPECT_EQ(text(*state), want) << "bit " << bit;
    }
  }
  EXPECT_GT(found, 100);  // The others hit pages that are not in use.
}

TEST_F(StoreTest, TermsAreCountedAndAnEarlierCopyIsRefused) {
  for (uint64_t term = 1; term <= 3; ++term) {
    const auto store = Open();
    ASSERT_TRUE(store->BeginTerm().ok());
    const auto state = store->Load();
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_EQ(state->terms.size(), term);
    EXPECT_EQ(state->terms.back().number, term);
    if (term == 2) std::filesystem::copy_file(path(), path() + ".old");
  }
  // The copy was made while the write-ahead log had the second term.
  std::filesystem::copy_file(path() + ".old", path(), std::filesystem::copy_options::overwrite_existing);
  const absl::Status refused = Open()->BeginTerm();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("eduba.witness says"));
  std::filesystem::remove(path());
  EXPECT_EQ(Open()->BeginTerm().code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::remove(dir_ / "eduba.witness");
  EXPECT_TRUE(Open()->BeginTerm().ok());
}

TEST_F(StoreTest, WithoutAFolderKeepsAllInMemory) {
  auto store = Store::Open("");
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_TRUE((*store)->Apply(EpochBegun{2}).ok());
  EXPECT_EQ((*store)->Load()->epoch, 2);
  EXPECT_TRUE(Store::Open("").ok());
}

}  // namespace
}  // namespace eduba
