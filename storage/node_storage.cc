#include "storage/node_storage.h"

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "storage/file.h"
#include "xxhash.h"

namespace eduba {
namespace {

constexpr char kFormat[] = "eduba content 1";
constexpr char kSessionPrefix[] = "session-";
constexpr char kRemovedPrefix[] = "removed-";
constexpr int64_t kSmallFileBytesMax = int64_t{16} << 20;

// Small files end with a line that has the hash of all before it.
std::string WithChecksum(const std::string& text) {
  return absl::StrFormat("%schecksum %016x\n", text, XXH3_64bits(text.data(), text.size()));
}

absl::StatusOr<std::string> ReadChecked(const std::string& path) {
  EDUBA_ASSIGN_OR_RETURN(std::string bytes, ReadFile(path, kSmallFileBytesMax));
  constexpr size_t kChecksumBytes = 9 + 16 + 1;
  if (bytes.size() >= kChecksumBytes) {
    std::string text = bytes.substr(0, bytes.size() - kChecksumBytes);
    if (WithChecksum(text) == bytes) return text;
  }
  return absl::DataLossError(absl::StrCat(path, " is damaged; restore it from a copy of the folder"));
}

}  // namespace

absl::Status CheckTerm(const ObeyedTerm& before, const ObeyedTerm& now) {
  if (now.number > before.number || now == before) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "this worker has obeyed a coordinator of term ", before.number, ", and does not obey ",
      now.number == before.number ? "another one of the same term" : absl::StrCat("one of term ", now.number),
      ": its records are an earlier copy; start the coordinator with the newest records"));
}

absl::StatusOr<std::unique_ptr<NodeStorage>> NodeStorage::Open(const std::string& data_dir,
                                                               uint64_t fingerprint) {
  const std::string root = absl::StrCat(data_dir, "/content");
  EDUBA_RETURN_IF_ERROR(MakeFolder(root));
  auto storage = std::unique_ptr<NodeStorage>(new NodeStorage(root, fingerprint));
  EDUBA_RETURN_IF_ERROR(storage->ReadDescription());
  EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(root));
  for (const std::string& name : names) {
    if (absl::StartsWith(name, kRemovedPrefix)) {
      EDUBA_RETURN_IF_ERROR(RemoveFolder(absl::StrCat(root, "/", name)));
    }
  }
  return storage;
}

absl::Status NodeStorage::ReadDescription() {
  const std::string path = absl::StrCat(root_, "/description");
  const absl::StatusOr<std::string> text = ReadChecked(path);
  if (absl::IsNotFound(text.status())) {
    // Sessions without a description: whose they are is not known.
    EDUBA_ASSIGN_OR_RETURN(const std::vector<uint64_t> sessions, Sessions());
    if (sessions.empty()) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat("there is no ", path,
                                            ", and sessions beside it; restore it from "
                                            "a copy, or choose another --data-dir"));
  }
  EDUBA_RETURN_IF_ERROR(text.status());
  const std::vector<std::string> lines = absl::StrSplit(*text, '\n');
  if (lines[0] != kFormat) {
    return absl::FailedPreconditionError(absl::StrCat(root_, " is of format '", lines[0],
                                                      "', this release knows '", kFormat,
                                                      "': start the release that wrote it, or choose "
                                                      "another --data-dir"));
  }
  uint64_t fingerprint = 0;
  for (const std::string& line : lines) {
    absl::string_view value = line;
    uint64_t cluster = 0;
    if (absl::ConsumePrefix(&value, "cluster ") && absl::SimpleHexAtoi(value, &cluster)) cluster_ = cluster;
    if (absl::ConsumePrefix(&value, "term ")) (void)absl::SimpleAtoi(value, &obeyed_.number);
    if (absl::ConsumePrefix(&value, "nonce ")) (void)absl::SimpleHexAtoi(value, &obeyed_.nonce);
    if (absl::ConsumePrefix(&value, "fingerprint ")) (void)absl::SimpleHexAtoi(value, &fingerprint);
  }
  if (fingerprint == fingerprint_) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrFormat(
      "%s was served with arithmetic %016x, and this worker's is %016x (another processor, --device or "
      "release): its answers would have other bits; start it as before, or choose another --data-dir",
      root_, fingerprint, fingerprint_));
}

absl::Status NodeStorage::WriteDescription() const {
  return WriteFile(
      absl::StrCat(root_, "/description"),
      WithChecksum(absl::StrFormat("%s\ncluster %016x\nterm %d\nnonce %016x\nfingerprint %016x\n", kFormat,
                                   cluster_.value(), obeyed_.number, obeyed_.nonce, fingerprint_)));
}

absl::Status NodeStorage::Enter(uint64_t cluster, const ObeyedTerm& term) {
  if (cluster_ && cluster_ != cluster) {
    return absl::FailedPreconditionError(
        absl::StrCat(root_,
                     " holds sessions of another coordinator's records; start this worker with that "
                     "coordinator, or with another --data-dir"));
  }
  EDUBA_RETURN_IF_ERROR(CheckTerm(obeyed_, term));
  if (cluster_ && term == obeyed_) return absl::OkStatus();
  const auto before = std::make_pair(cluster_, obeyed_);
  cluster_ = cluster;
  obeyed_ = term;
  const absl::Status status = WriteDescription();
  if (!status.ok()) std::tie(cluster_, obeyed_) = before;
  return status;
}

absl::StatusOr<std::vector<uint64_t>> NodeStorage::Sessions() const {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(root_));
  std::vector<uint64_t> ids;
  for (const std::string& name : names) {
    absl::string_view text = name;
    uint64_t id = 0;
    if (absl::ConsumePrefix(&text, kSessionPrefix) && absl::SimpleAtoi(text, &id)) ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::string NodeStorage::FolderOf(uint64_t session_id) const {
  return absl::StrCat(root_, "/", kSessionPrefix, session_id);
}

absl::Status NodeStorage::Create(uint64_t session_id, const std::string& descriptor) {
  // A session begins to exist with its folder's name, so the folder gets it when all is in it.
  const std::string part = absl::StrCat(root_, "/", kRemovedPrefix, session_id);
  EDUBA_RETURN_IF_ERROR(RemoveFolder(part));
  EDUBA_RETURN_IF_ERROR(MakeFolder(part));
  EDUBA_RETURN_IF_ERROR(WriteFile(absl::StrCat(part, "/session"), WithChecksum(descriptor)));
  if (std::rename(part.c_str(), FolderOf(session_id).c_str()) != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot make ", FolderOf(session_id), "; look after that folder"));
  }
  return SyncFolder(root_);
}

absl::StatusOr<std::string> NodeStorage::Descriptor(uint64_t session_id) const {
  return ReadChecked(absl::StrCat(FolderOf(session_id), "/session"));
}

void NodeStorage::Erase(uint64_t session_id) {
  const std::string removed = absl::StrCat(root_, "/", kRemovedPrefix, session_id);
  absl::Status status = RemoveFolder(removed);
  if (status.ok() && std::rename(FolderOf(session_id).c_str(), removed.c_str()) == 0)
    status = RemoveFolder(removed);
  if (!status.ok()) LogWarning(std::string(status.message()));
}

}  // namespace eduba
