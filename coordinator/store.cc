#include "coordinator/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "rpc/placement.h"
#include "rpc/spec.h"
#include "sqlite3.h"
#include "storage/file.h"
#include "xxhash.h"

namespace eduba {
namespace {

// One more with every change of the tables.
constexpr int kSchemaVersion = 3;
// "Edub": another program's database is not to be taken for ours.
constexpr int kApplicationId = 0x45647562;

// Every row has a hash of its other columns, of row_hash below, because SQLite checks the structure of a
// database and not what is in it. A session's row also counts its appends, and meta counts the sessions, so
// that a row that is missing is missed.
constexpr char kSchema[] = R"sql(
  CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL, hash INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
  CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    spec BLOB NOT NULL,             -- eduba.v1.SessionSpec, completed
    created_unix_ms INTEGER NOT NULL,
    placement BLOB NOT NULL DEFAULT x'',  -- eduba.v1.PagePlacement; empty: of a release that knew no nodes
    appends INTEGER NOT NULL DEFAULT 0,   -- how many rows of the table appends belong to it
    hash INTEGER NOT NULL DEFAULT 0
  );
  CREATE TABLE appends (
    session_id INTEGER NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    at INTEGER NOT NULL,
    count INTEGER NOT NULL,
    digest_low INTEGER NOT NULL,    -- the bits of an unsigned number
    digest_high INTEGER NOT NULL,
    hash INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (session_id, at)
  ) WITHOUT ROWID;
  -- The starts of coordinators with these records.
  CREATE TABLE terms (number INTEGER PRIMARY KEY, nonce INTEGER NOT NULL, hash INTEGER NOT NULL);
  INSERT INTO meta (key, value) VALUES ('epoch', 0), ('next_session_id', 1), ('cluster', random()), ('sessions', 0);
  UPDATE meta SET hash = row_hash(key, value);
)sql";

// From schema 1, whose sessions had no placement: those that are empty get one when a group forms; content of
// the others was in the memory of workers that are gone.
constexpr char kFromSchema1[] = R"sql(
  ALTER TABLE sessions ADD COLUMN placement BLOB NOT NULL DEFAULT x'';
  INSERT INTO meta VALUES ('cluster', random());
)sql";
// From schema 2, whose rows had no hashes.
constexpr char kFromSchema2[] = R"sql(
  ALTER TABLE meta ADD COLUMN hash INTEGER NOT NULL DEFAULT 0;
  ALTER TABLE sessions ADD COLUMN appends INTEGER NOT NULL DEFAULT 0;
  ALTER TABLE sessions ADD COLUMN hash INTEGER NOT NULL DEFAULT 0;
  ALTER TABLE appends ADD COLUMN hash INTEGER NOT NULL DEFAULT 0;
  CREATE TABLE terms (number INTEGER PRIMARY KEY, nonce INTEGER NOT NULL, hash INTEGER NOT NULL);
  INSERT INTO meta (key, value) SELECT 'sessions', count(*) FROM sessions;
  UPDATE meta SET hash = row_hash(key, value);
  UPDATE sessions SET appends = (SELECT count(*) FROM appends WHERE session_id = id);
  UPDATE sessions SET hash = row_hash(id, name, spec, created_unix_ms, placement, appends);
  UPDATE appends SET hash = row_hash(session_id, at, count, digest_low, digest_high);
)sql";
constexpr const char* kSteps[] = {kSchema, kFromSchema1, kFromSchema2};  // From schema 0, 1, 2.

constexpr int64_t kWitnessBytesMax = 4096;

// SQL: the hash of its arguments, their types included.
void RowHash(sqlite3_context* context, int count, sqlite3_value** arguments) {
  std::string bytes;
  for (int i = 0; i < count; ++i) {
    const int type = sqlite3_value_type(arguments[i]);
    const int64_t number = type == SQLITE_INTEGER ? sqlite3_value_int64(arguments[i]) : 0;
    const void* data = type == SQLITE_INTEGER ? &number : sqlite3_value_blob(arguments[i]);
    const int64_t size = type == SQLITE_INTEGER ? int64_t{8} : sqlite3_value_bytes(arguments[i]);
    absl::StrAppend(&bytes, type, ":", size, ":");
    if (size > 0) bytes.append(static_cast<const char*>(data), static_cast<size_t>(size));
  }
  sqlite3_result_int64(context, static_cast<int64_t>(XXH3_64bits(bytes.data(), bytes.size())));
}

// What DIR/eduba.witness says: the newest start, and whose records it was with.
std::string WitnessText(uint64_t cluster, const Term& term) {
  return absl::StrFormat("eduba witness 1\ncluster %016x\nterm %d\nnonce %016x\n", cluster, term.number,
                         term.nonce);
}

// Empty bytes: there is no placement.
std::string PlacementBytes(const Placement& placement) {
  return placement.nodes.empty() ? std::string() : PlacementToProto(placement).SerializeAsString();
}
bool ParsePlacement(const std::string& bytes, Placement* placement) {
  if (bytes.empty()) return true;
  v1::PagePlacement proto;
  if (!proto.ParseFromString(bytes)) return false;
  absl::StatusOr<Placement> parsed = PlacementFromProto(proto);
  if (!parsed.ok()) return false;
  *placement = *std::move(parsed);
  return true;
}

}  // namespace

// One prepared statement; the first error is kept.
class Store::Statement {
 public:
  Statement(Store* store, const char* sql) : store_(store) {
    error_ = sqlite3_prepare_v2(store->db_, sql, -1, &statement_, nullptr);
  }
  ~Statement() { sqlite3_finalize(statement_); }
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;

  Statement& Bind(int64_t value) {
    if (error_ == SQLITE_OK) error_ = sqlite3_bind_int64(statement_, ++bound_, value);
    return *this;
  }
  Statement& Bind(uint64_t value) { return Bind(static_cast<int64_t>(value)); }
  // The text must outlive the statement.
  Statement& BindText(const std::string& value) {
    if (error_ == SQLITE_OK) {
      error_ = sqlite3_bind_text(statement_, ++bound_, value.data(), static_cast<int>(value.size()),
                                 SQLITE_STATIC);
    }
    return *this;
  }
  Statement& BindBlob(const std::string& value) {
    if (error_ == SQLITE_OK) {
      error_ = sqlite3_bind_blob(statement_, ++bound_, value.data(), static_cast<int>(value.size()),
                                 SQLITE_STATIC);
    }
    return *this;
  }

  // True: there is a row.
  absl::StatusOr<bool> Step(const std::string& doing) {
    if (error_ == SQLITE_OK) error_ = sqlite3_step(statement_);
    if (error_ == SQLITE_DONE) return false;
    if (error_ != SQLITE_ROW) return store_->Error(error_, doing);
    error_ = SQLITE_OK;
    return true;
  }
  absl::Status Run(const std::string& doing) { return Step(doing).status(); }

  int64_t Int(int column) { return sqlite3_column_int64(statement_, column); }
  std::string Bytes(int column) {
    const void* data = sqlite3_column_blob(statement_, column);
    const int size = sqlite3_column_bytes(statement_, column);
    return size == 0 ? std::string() : std::string(static_cast<const char*>(data), size);
  }

 private:
  Store* const store_;
  sqlite3_stmt* statement_ = nullptr;
  int error_ = SQLITE_OK;
  int bound_ = 0;
};

Store::Store(std::string path, sqlite3* db) : path_(std::move(path)), db_(db) {}

Store::~Store() { sqlite3_close(db_); }

absl::StatusOr<std::unique_ptr<Store>> Store::Open(const std::string& dir) {
  std::string path = ":memory:";
  if (!dir.empty()) {
    const absl::Status made = MakeFolders(dir);
    if (!made.ok()) {
      return absl::FailedPreconditionError(absl::StrCat("data folder ", dir,
                                                        " cannot be created: ", std::string(made.message()),
                                                        "; or choose another --data-dir"));
    }
    path = (std::filesystem::path(dir) / "eduba.db").string();
    // Readable by nobody else, and so are the files that SQLite puts beside it.
    const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0) {
      (void)fchmod(file, 0600);
      close(file);
    }
  }
  sqlite3* db = nullptr;
  const int code = sqlite3_open_v2(path.c_str(), &db,
                                   SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  auto store = std::unique_ptr<Store>(new Store(path, db));
  if (code != SQLITE_OK) return store->Error(code, "open");
  EDUBA_RETURN_IF_ERROR(store->Prepare());
  return store;
}

absl::Status Store::Prepare() {
  sqlite3_extended_result_codes(db_, 1);
  // The lock is taken with the first read and kept: two coordinators would both give out epochs.
  EDUBA_RETURN_IF_ERROR(Execute("PRAGMA locking_mode = EXCLUSIVE"));
  EDUBA_RETURN_IF_ERROR(Execute("BEGIN EXCLUSIVE; COMMIT"));
  int64_t version = 0;
  {
    Statement statement(
        this,
        "SELECT (SELECT user_version FROM pragma_user_version()), (SELECT application_id FROM "
        "pragma_application_id()), (SELECT count(*) FROM sqlite_schema)");
    EDUBA_RETURN_IF_ERROR(statement.Run("read the version of"));
    version = statement.Int(0);
    const bool fresh = version == 0 && statement.Int(1) == 0 && statement.Int(2) == 0;
    if (!fresh && statement.Int(1) != kApplicationId) {
      return absl::FailedPreconditionError(
          absl::StrCat("database ", path_, " is another program's: choose another --data-dir"));
    }
  }
  if (version > kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("database ", path_, " has schema ", version, ", this release knows ", kSchemaVersion,
                     ": start the newer release, or choose another --data-dir"));
  }
  EDUBA_RETURN_IF_ERROR(Execute("PRAGMA journal_mode = WAL"));
  EDUBA_RETURN_IF_ERROR(Execute("PRAGMA synchronous = FULL"));
  EDUBA_RETURN_IF_ERROR(Execute("PRAGMA foreign_keys = ON"));
  // What is deleted is overwritten.
  EDUBA_RETURN_IF_ERROR(Execute("PRAGMA secure_delete = ON"));
  const int code = sqlite3_create_function(db_, "row_hash", -1, SQLITE_UTF8 | SQLITE_DETERMINISTIC, nullptr,
                                           RowHash, nullptr, nullptr);
  if (code != SQLITE_OK) return Error(code, "prepare");
  if (version < kSchemaVersion) {
    std::string steps = version == 0 ? kSteps[0] : "";
    for (int64_t from = std::max<int64_t>(1, version); version > 0 && from < kSchemaVersion; ++from) {
      absl::StrAppend(&steps, kSteps[from]);
    }
    EDUBA_RETURN_IF_ERROR(Execute(absl::StrCat("BEGIN;", steps, "PRAGMA user_version = ", kSchemaVersion,
                                               "; PRAGMA application_id = ", kApplicationId, "; COMMIT")
                                      .c_str()));
  }
  Statement check(this, "PRAGMA quick_check(1)");
  EDUBA_RETURN_IF_ERROR(check.Run("check"));
  if (check.Bytes(0) != "ok") return Error(SQLITE_CORRUPT, absl::StrCat("check (", check.Bytes(0), ")"));
  return absl::OkStatus();
}

absl::Status Store::Execute(const char* sql) {
  const int code = sqlite3_exec(db_, sql, nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Error(code, "use");
}

absl::Status Store::Error(int code, const std::string& doing) const {
  const std::string text = absl::StrCat("cannot ", doing, " database ", path_, ": ",
                                        db_ == nullptr ? "no memory" : sqlite3_errmsg(db_));
  switch (code & 0xff) {
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::UnavailableError(
          absl::StrCat(text, "; another coordinator uses it: stop that one, or choose another --data-dir"));
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(absl::StrCat(text, "; free some space"));
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(
          absl::StrCat(text, "; it is damaged: restore it from a copy, or move it away to begin anew"));
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
    case SQLITE_READONLY:
      return absl::FailedPreconditionError(absl::StrCat(text, "; check the folder's permissions"));
    default:
      return absl::InternalError(text);
  }
}

absl::StatusOr<StoredState> Store::Load() {
  const auto damaged = [this](const std::string& what) {
    return absl::DataLossError(absl::StrCat("database ", path_, " is damaged: ", what,
                                            "; restore it from a copy, or move it away to begin anew"));
  };
  StoredState state;
  Statement hashes(
      this,
      "SELECT (SELECT count(*) FROM meta WHERE hash <> row_hash(key, value))"
      " + (SELECT count(*) FROM sessions WHERE hash <> row_hash(id, name, spec, created_unix_ms,"
      " placement, appends))"
      " + (SELECT count(*) FROM appends WHERE hash <> row_hash(session_id, at, count, digest_low,"
      " digest_high))"
      " + (SELECT count(*) FROM terms WHERE hash <> row_hash(number, nonce)),"
      " (SELECT count(*) FROM sessions) - (SELECT value FROM meta WHERE key = 'sessions'),"
      " (SELECT count(*) FROM appends) - (SELECT coalesce(sum(appends), 0) FROM sessions)");
  EDUBA_RETURN_IF_ERROR(hashes.Run("read"));
  if (hashes.Int(0) != 0) return damaged(absl::StrCat(hashes.Int(0), " rows are not what was written"));
  if (hashes.Int(1) != 0 || hashes.Int(2) != 0) return damaged("rows are missing");
  Statement meta(this,
                 "SELECT (SELECT value FROM meta WHERE key = 'epoch'), (SELECT value FROM meta WHERE key = "
                 "'next_session_id'), (SELECT value FROM meta WHERE key = 'cluster')");
  EDUBA_RETURN_IF_ERROR(meta.Run("read"));
  state.epoch = static_cast<uint64_t>(meta.Int(0));
  state.next_session_id = static_cast<uint64_t>(meta.Int(1));
  state.cluster = static_cast<uint64_t>(meta.Int(2));
  if (state.next_session_id == 0) return damaged("it has no next session id");

  Statement terms(this, "SELECT number, nonce FROM terms ORDER BY number");
  for (;;) {
    EDUBA_ASSIGN_OR_RETURN(const bool row, terms.Step("read"));
    if (!row) break;
    state.terms.push_back({static_cast<uint64_t>(terms.Int(0)), static_cast<uint64_t>(terms.Int(1))});
  }

  std::unordered_map<uint64_t, size_t> index;
  Statement sessions(this, "SELECT id, name, spec, created_unix_ms, placement FROM sessions ORDER BY id");
  for (;;) {
    EDUBA_ASSIGN_OR_RETURN(const bool row, sessions.Step("read"));
    if (!row) break;
    SessionRecord record;
    record.id = static_cast<uint64_t>(sessions.Int(0));
    record.name = sessions.Bytes(1);
    record.created_unix_ms = sessions.Int(3);
    if (!record.spec.ParseFromString(sessions.Bytes(2)) || !CompleteSpec(record.spec).ok() ||
        !ValidateSessionName(record.name).ok() || record.id >= state.next_session_id ||
        !ParsePlacement(sessions.Bytes(4), &record.placement)) {
      return damaged(absl::StrCat("session ", record.id, " cannot be read"));
    }
    index[record.id] = state.sessions.size();
    state.sessions.push_back(std::move(record));
  }
  Statement appends(
      this, "SELECT session_id, at, count, digest_low, digest_high FROM appends ORDER BY session_id, at");
  for (;;) {
    EDUBA_ASSIGN_OR_RETURN(const bool row, appends.Step("read"));
    if (!row) break;
    const auto session = index.find(static_cast<uint64_t>(appends.Int(0)));
    const AppendRecord append{appends.Int(1),
                              appends.Int(2),
                              {static_cast<uint64_t>(appends.Int(3)), static_cast<uint64_t>(appends.Int(4))}};
    if (session == index.end()) return damaged("an append belongs to no session");
    SessionRecord& record = state.sessions[session->second];
    if (append.at != record.length() || append.count < 1 || append.count > kMaxPositions - append.at) {
      return damaged(absl::StrCat("the appends of session '", record.name, "' leave a gap"));
    }
    record.appends.push_back(append);
  }
  return state;
}

absl::Status Store::BeginTerm() {
  EDUBA_ASSIGN_OR_RETURN(const StoredState state, Load());
  const std::string witness =
      absl::StrCat(std::filesystem::path(path_).parent_path().string(), "/eduba.witness");
  const bool on_disk = path_ != ":memory:";
  if (on_disk) {
    const absl::StatusOr<std::string> seen = ReadFile(witness, kWitnessBytesMax);
    if (!seen.ok() && !absl::IsNotFound(seen.status())) return seen.status();
    const bool agrees =
        !seen.ok() || std::any_of(state.terms.begin(), state.terms.end(), [&](const Term& term) {
          return *seen == WitnessText(state.cluster, term);
        });
    if (!agrees) {
      return absl::FailedPreconditionError(absl::StrCat(
          "database ", path_, " is older than ", witness, " says: an earlier copy was put back, or ", path_,
          "-wal is lost; restore the newest copy of the whole folder, or remove ", witness,
          " to go on without what is missing"));
    }
  }
  std::random_device random;
  const Term term{state.terms.empty() ? 1 : state.terms.back().number + 1,
                  uint64_t{random()} << 32 | random()};
  EDUBA_RETURN_IF_ERROR(Statement(this, "INSERT INTO terms VALUES (?1, ?2, row_hash(?1, ?2))")
                            .Bind(term.number)
                            .Bind(term.nonce)
                            .Run("begin a term in"));
  return on_disk ? WriteFile(witness, WitnessText(state.cluster, term)) : absl::OkStatus();
}

absl::Status Store::Apply(const Change& change) { return ApplyAll({change})[0]; }

std::vector<absl::Status> Store::ApplyAll(const std::vector<Change>& changes) {
  const absl::Status together = ApplyInTransaction(changes);
  if (together.ok() || changes.size() == 1) return std::vector<absl::Status>(changes.size(), together);
  std::vector<absl::Status> statuses;
  for (const Change& change : changes) statuses.push_back(ApplyInTransaction({change}));
  return statuses;
}

absl::Status Store::ApplyInTransaction(const std::vector<Change>& changes) {
  EDUBA_RETURN_IF_ERROR(Execute("BEGIN"));
  absl::Status status;
  for (const Change& change : changes) {
    if (status.ok()) status = ApplyOne(change);
  }
  if (status.ok()) status = Execute("COMMIT");
  // After some errors (a full disk) SQLite has rolled back by itself.
  if (!status.ok() && sqlite3_get_autocommit(db_) == 0) (void)Execute("ROLLBACK");
  return status;
}

absl::Status Store::ApplyOne(const Change& change) {
  if (const auto* begun = std::get_if<EpochBegun>(&change)) return SetMeta("epoch", begun->epoch);
  if (const auto* created = std::get_if<SessionCreated>(&change)) {
    const SessionRecord& session = created->session;
    const std::string spec = session.spec.SerializeAsString();
    const std::string placement = PlacementBytes(session.placement);
    EDUBA_RETURN_IF_ERROR(
        Statement(this,
                  "INSERT INTO sessions (id, name, spec, created_unix_ms, placement) VALUES (?, ?, ?, ?, ?)")
            .Bind(session.id)
            .BindText(session.name)
            .BindBlob(spec)
            .Bind(session.created_unix_ms)
            .BindBlob(placement)
            .Run("add a session to"));
    EDUBA_RETURN_IF_ERROR(HashSession(session.id));
    for (const AppendRecord& append : session.appends) EDUBA_RETURN_IF_ERROR(AddAppend(session.id, append));
    EDUBA_RETURN_IF_ERROR(CountSessions());
    return SetMeta("next_session_id", session.id + 1);
  }
  if (const auto* erased = std::get_if<SessionErased>(&change)) {
    EDUBA_RETURN_IF_ERROR(Statement(this, "DELETE FROM sessions WHERE id = ?")
                              .Bind(erased->session_id)
                              .Run("erase a session from"));
    return CountSessions();
  }
  if (const auto* placed = std::get_if<SessionPlaced>(&change)) {
    // The statement changes nothing where the session has been erased meanwhile.
    const std::string placement = PlacementBytes(placed->placement);
    EDUBA_RETURN_IF_ERROR(Statement(this, "UPDATE sessions SET placement = ? WHERE id = ?")
                              .BindBlob(placement)
                              .Bind(placed->session_id)
                              .Run("place a session in"));
    return HashSession(placed->session_id);
  }
  const auto& committed = std::get<AppendCommitted>(change);
  return AddAppend(committed.session_id, committed.append);
}

absl::Status Store::AddAppend(uint64_t session_id, const AppendRecord& append) {
  EDUBA_RETURN_IF_ERROR(
      Statement(this,
                "INSERT INTO appends (session_id, at, count, digest_low, digest_high, hash) "
                "VALUES (?1, ?2, ?3, ?4, ?5, row_hash(?1, ?2, ?3, ?4, ?5))")
          .Bind(session_id)
          .Bind(append.at)
          .Bind(append.count)
          .Bind(append.digest.low)
          .Bind(append.digest.high)
          .Run("add an append to"));
  EDUBA_RETURN_IF_ERROR(Statement(this, "UPDATE sessions SET appends = appends + 1 WHERE id = ?")
                            .Bind(session_id)
                            .Run("add an append to"));
  return HashSession(session_id);
}

absl::Status Store::HashSession(uint64_t session_id) {
  return Statement(this,
                   "UPDATE sessions SET hash = row_hash(id, name, spec, created_unix_ms, placement, appends) "
                   "WHERE id = ?")
      .Bind(session_id)
      .Run("write to");
}

absl::Status Store::CountSessions() {
  EDUBA_RETURN_IF_ERROR(
      Execute("UPDATE meta SET value = (SELECT count(*) FROM sessions) WHERE key = 'sessions'"));
  return Execute("UPDATE meta SET hash = row_hash(key, value) WHERE key = 'sessions'");
}

absl::Status Store::SetMeta(const char* key, uint64_t value) {
  const std::string name = key;
  return Statement(
             this,
             "UPDATE meta SET value = max(value, ?1), hash = row_hash(key, max(value, ?1)) WHERE key = ?2")
      .Bind(value)
      .BindText(name)
      .Run("write to");
}

}  // namespace eduba
