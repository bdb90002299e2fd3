#include "coordinator/store.h"

#include <sqlite3.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// PRAGMA user_version. Raise it with a migration in Initialise.
constexpr int kSchemaVersion = 1;
// "Edub", so that another program's database is not taken for ours.
constexpr int kApplicationId = 0x45647562;

constexpr const char* kSchema = R"(
  CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
  INSERT INTO meta VALUES ('epoch', 0), ('next_session_id', 1);
  CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, spec BLOB NOT NULL, created_unix_ms INTEGER NOT NULL);
  CREATE TABLE appends (
    session_id INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    at INTEGER NOT NULL, count INTEGER NOT NULL, digest_low INTEGER NOT NULL, digest_high INTEGER NOT NULL,
    PRIMARY KEY (session_id, at)) WITHOUT ROWID;
)";

}  // namespace

// One prepared statement: bind in order, step, read columns.
class Statement {
 public:
  Statement(Store* store, const char* sql) : store_(store) {
    code_ = sqlite3_prepare_v2(store->db_, sql, -1, &statement_, nullptr);
  }
  ~Statement() { sqlite3_finalize(statement_); }
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;

  // SQLite's integers are signed; an unsigned value keeps its bits.
  Statement& Bind(uint64_t value) { return Bind(static_cast<int64_t>(value)); }
  Statement& Bind(int64_t value) {
    if (code_ == SQLITE_OK) code_ = sqlite3_bind_int64(statement_, ++bound_, value);
    return *this;
  }
  Statement& BindText(const std::string& value) {
    if (code_ == SQLITE_OK) {
      code_ = sqlite3_bind_text64(statement_, ++bound_, value.data(), value.size(), SQLITE_TRANSIENT,
                                  SQLITE_UTF8);
    }
    return *this;
  }
  Statement& BindBlob(const std::string& value) {
    if (code_ == SQLITE_OK) {
      code_ = sqlite3_bind_blob64(statement_, ++bound_, value.data(), value.size(), SQLITE_TRANSIENT);
    }
    return *this;
  }

  // True while there is a row.
  absl::StatusOr<bool> Step(const char* doing) {
    if (code_ == SQLITE_OK || code_ == SQLITE_ROW) code_ = sqlite3_step(statement_);
    if (code_ == SQLITE_ROW) return true;
    if (code_ == SQLITE_DONE) return false;
    return store_->Error(code_, doing);
  }
  // For statements that return no rows.
  absl::Status Run(const char* doing) { return Step(doing).status(); }

  int64_t Int(int column) { return sqlite3_column_int64(statement_, column); }
  uint64_t Unsigned(int column) { return static_cast<uint64_t>(Int(column)); }
  std::string Bytes(int column) {
    const void* data = sqlite3_column_blob(statement_, column);
    return data == nullptr
               ? std::string()
               : std::string(static_cast<const char*>(data), sqlite3_column_bytes(statement_, column));
  }

 private:
  Store* store_;
  sqlite3_stmt* statement_ = nullptr;
  int code_ = SQLITE_OK;
  int bound_ = 0;
};

absl::StatusOr<std::unique_ptr<Store>> Store::Open(const std::string& data_dir) {
  std::string path = ":memory:";
  if (!data_dir.empty()) {
    if (mkdir(data_dir.c_str(), 0700) != 0 && errno != EEXIST) {
      return absl::UnavailableError(absl::StrCat("data directory ", data_dir, " cannot be made (",
                                                 std::strerror(errno),
                                                 "): make it or choose another --data-dir"));
    }
    path = absl::StrCat(data_dir, "/coordinator.sqlite");
  }
  auto store = std::unique_ptr<Store>(new Store(path));
  const int code =
      sqlite3_open_v2(path.c_str(), &store->db_, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, nullptr);
  if (code != SQLITE_OK) return store->Error(code, "opening");
  EDUBA_RETURN_IF_ERROR(store->Initialise());
  return store;
}

Store::~Store() { sqlite3_close(db_); }

absl::Status Store::Error(int code, const std::string& doing) const {
  const std::string what = absl::StrCat(path_, ": ", doing, ": ", sqlite3_errmsg(db_));
  switch (code & 0xff) {
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::FailedPreconditionError(absl::StrCat(
          what, "; another coordinator uses this directory: stop it or choose another --data-dir"));
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_FORMAT:
      return absl::DataLossError(
          absl::StrCat(what, "; the file is damaged or not a coordinator's: move it away to start anew"));
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(absl::StrCat(what, "; make room on the disk and try again"));
    default:
      return absl::UnavailableError(absl::StrCat(what, "; check the directory, its owner and its disk"));
  }
}

absl::Status Store::Execute(const std::string& sql) {
  const int code = sqlite3_exec(db_, sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Error(code, "writing");
}

absl::Status Store::Initialise() {
  // An exclusive lock from the first write on, for as long as the file is open: one coordinator per
  // directory. The empty write transaction takes it at once.
  EDUBA_RETURN_IF_ERROR(
      Execute("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
              "PRAGMA foreign_keys = ON; BEGIN EXCLUSIVE; COMMIT;"));
  int64_t version = 0;
  int64_t application = 0;
  int64_t tables = 0;
  {
    Statement statement(this,
                        "SELECT (SELECT user_version FROM pragma_user_version()),"
                        " (SELECT application_id FROM pragma_application_id()),"
                        " (SELECT count(*) FROM sqlite_schema)");
    EDUBA_ASSIGN_OR_RETURN(const bool row, statement.Step("reading the schema version"));
    if (row) {
      version = statement.Int(0);
      application = statement.Int(1);
      tables = statement.Int(2);
    }
  }
  if (application == 0 && tables == 0) {
    return Execute(absl::StrCat("BEGIN;", kSchema, "PRAGMA user_version = ", kSchemaVersion,
                                "; PRAGMA application_id = ", kApplicationId, "; COMMIT;"));
  }
  if (application != kApplicationId) return Error(SQLITE_NOTADB, "checking whose it is");
  if (version > kSchemaVersion) {
    return absl::FailedPreconditionError(absl::StrCat(path_, " has schema ", version,
                                                      ", this program knows up to ", kSchemaVersion,
                                                      ": use the newer Eduba that wrote it"));
  }
  Statement check(this, "PRAGMA quick_check(1)");
  EDUBA_ASSIGN_OR_RETURN(const bool row, check.Step("checking"));
  if (!row || check.Bytes(0) != "ok")
    return Error(SQLITE_CORRUPT, absl::StrCat("checking (", check.Bytes(0), ")"));
  return absl::OkStatus();
}

absl::StatusOr<StoredState> Store::Load() {
  StoredState state;
  {
    Statement meta(this,
                   "SELECT (SELECT value FROM meta WHERE key = 'epoch'),"
                   " (SELECT value FROM meta WHERE key = 'next_session_id')");
    EDUBA_ASSIGN_OR_RETURN(const bool row, meta.Step("reading meta"));
    if (!row) return Error(SQLITE_CORRUPT, "reading meta");
    state.epoch = meta.Unsigned(0);
    state.next_session_id = meta.Unsigned(1);
  }
  std::map<uint64_t, size_t> index;  // session id -> its place in state.sessions
  Statement sessions(this, "SELECT id, name, spec, created_unix_ms FROM sessions ORDER BY id");
  for (;;) {
    EDUBA_ASSIGN_OR_RETURN(const bool row, sessions.Step("reading sessions"));
    if (!row) break;
    SessionRecord session;
    session.id = sessions.Unsigned(0);
    session.name = sessions.Bytes(1);
    if (!session.spec.ParseFromString(sessions.Bytes(2))) {
      return Error(SQLITE_CORRUPT, absl::StrCat("reading the spec of session ", session.name));
    }
    session.created_unix_ms = sessions.Int(3);
    index[session.id] = state.sessions.size();
    state.sessions.push_back(std::move(session));
  }
  Statement appends(
      this, "SELECT session_id, at, count, digest_low, digest_high FROM appends ORDER BY session_id, at");
  for (;;) {
    EDUBA_ASSIGN_OR_RETURN(const bool row, appends.Step("reading appends"));
    if (!row) break;
    const auto found = index.find(appends.Unsigned(0));
    if (found == index.end()) return Error(SQLITE_CORRUPT, "reading appends of a session that is not there");
    SessionRecord& session = state.sessions[found->second];
    const AppendRecord append{appends.Int(1), appends.Int(2), {appends.Unsigned(3), appends.Unsigned(4)}};
    if (append.at != session.length() || append.count < 1) {
      return Error(SQLITE_CORRUPT, absl::StrCat("reading appends of session ", session.name, ": a gap at ",
                                                session.length()));
    }
    session.appends.push_back(append);
  }
  return state;
}

absl::Status Store::Apply(const Change& change) {
  EDUBA_RETURN_IF_ERROR(Execute("BEGIN IMMEDIATE"));
  absl::Status status;
  if (const auto* epoch = std::get_if<EpochBegun>(&change)) {
    status = Statement(this, "UPDATE meta SET value = ? WHERE key = 'epoch'")
                 .Bind(epoch->epoch)
                 .Run("storing an epoch");
  } else if (const auto* created = std::get_if<SessionCreated>(&change)) {
    const SessionRecord& session = created->session;
    status = Statement(this, "INSERT INTO sessions VALUES (?, ?, ?, ?)")
                 .Bind(session.id)
                 .BindText(session.name)
                 .BindBlob(session.spec.SerializeAsString())
                 .Bind(session.created_unix_ms)
                 .Run("storing a session");
    if (status.ok()) {
      status = Statement(this, "UPDATE meta SET value = max(value, ?) WHERE key = 'next_session_id'")
                   .Bind(session.id + 1)
                   .Run("storing a session");
    }
  } else if (const auto* erased = std::get_if<SessionErased>(&change)) {
    status = Statement(this, "DELETE FROM sessions WHERE id = ?")
                 .Bind(erased->session_id)
                 .Run("erasing a session");
  } else if (const auto* committed = std::get_if<AppendCommitted>(&change)) {
    status = Statement(this, "INSERT INTO appends VALUES (?, ?, ?, ?, ?)")
                 .Bind(committed->session_id)
                 .Bind(committed->append.at)
                 .Bind(committed->append.count)
                 .Bind(committed->append.digest.low)
                 .Bind(committed->append.digest.high)
                 .Run("storing an append");
  }
  if (status.ok()) status = Execute("COMMIT");
  // After a failed statement or COMMIT the transaction may have ended by itself; ROLLBACK then says so, which
  // is no news.
  if (!status.ok()) sqlite3_exec(db_, "ROLLBACK", nullptr, nullptr, nullptr);
  return status;
}

}  // namespace eduba
