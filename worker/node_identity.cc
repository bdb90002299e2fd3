#include "worker/node_identity.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "storage/file.h"

namespace eduba {
namespace {

constexpr size_t kIdBytesMax = 64;

bool IsNodeId(const std::string& id) {
  return !id.empty() && id.size() <= kIdBytesMax && std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

// After a failed call on a file of the data directory.
absl::Status FileError(const std::string& path, const char* doing) {
  return absl::FailedPreconditionError(
      absl::StrCat("cannot ", doing, " ", path, ": ", std::strerror(errno), "; choose another --data-dir"));
}

// Returns the open file that holds the lock.
absl::StatusOr<int> LockDirectory(const std::string& dir) {
  const absl::Status made = MakeFolders(dir);
  if (!made.ok()) {
    return absl::FailedPreconditionError(absl::StrCat("data folder ", dir,
                                                      " cannot be created: ", std::string(made.message()),
                                                      "; or choose another --data-dir"));
  }
  const std::string path = absl::StrCat(dir, "/worker.lock");
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) return FileError(path, "open");
  if (flock(file, LOCK_EX | LOCK_NB) == 0) return file;
  const bool taken = errno == EWOULDBLOCK;
  absl::Status failed =
      taken ? absl::FailedPreconditionError(absl::StrCat("another worker that runs has data folder ", dir,
                                                         "; give each its own --data-dir"))
            : FileError(path, "lock");
  close(file);
  return failed;
}

// The id that the file holds, or "": there is no file.
absl::StatusOr<std::string> ReadId(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0 && errno == ENOENT) return std::string();
  if (file < 0) return FileError(path, "open");
  char bytes[kIdBytesMax + 2];
  const ssize_t count = read(file, bytes, sizeof(bytes));
  absl::Status failed = count < 0 ? FileError(path, "read") : absl::OkStatus();
  close(file);
  EDUBA_RETURN_IF_ERROR(failed);
  std::string id(bytes, static_cast<size_t>(count));
  if (!id.empty() && id.back() == '\n') id.pop_back();
  if (!IsNodeId(id)) {
    return absl::DataLossError(
        absl::StrCat(path, " holds no node id; restore it, or choose another --data-dir"));
  }
  return id;
}

absl::Status WriteAndClose(int file, const std::string& path, const std::string& text) {
  const bool written = write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  absl::Status failed = written && fsync(file) == 0 ? absl::OkStatus() : FileError(path, "write");
  close(file);
  return failed;
}

// Whole or not at all, also where the machine stops in the middle. REQUIRES: the directory is locked.
absl::Status WriteId(const std::string& dir, const std::string& path, const std::string& id) {
  const std::string part = absl::StrCat(path, ".part");
  const int file = open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0) return FileError(part, "open");
  EDUBA_RETURN_IF_ERROR(WriteAndClose(file, part, absl::StrCat(id, "\n")));
  if (rename(part.c_str(), path.c_str()) != 0) return FileError(path, "write");
  const int folder = open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return FileError(dir, "open");
  absl::Status failed = fsync(folder) == 0 ? absl::OkStatus() : FileError(dir, "write");
  close(folder);
  return failed;
}

absl::StatusOr<std::string> KeptId(const std::string& given, const std::string& dir) {
  const std::string path = absl::StrCat(dir, "/node_id");
  EDUBA_ASSIGN_OR_RETURN(std::string kept, ReadId(path));
  if (!kept.empty()) {
    if (given.empty() || given == kept) return kept;
    return absl::FailedPreconditionError(absl::StrCat("data folder ", dir, " is that of node ", kept,
                                                      ", and this worker is to be node ", given,
                                                      "; leave out --node-id, or choose another --data-dir"));
  }
  kept = given.empty() ? RandomId() : given;
  EDUBA_RETURN_IF_ERROR(WriteId(dir, path, kept));
  return kept;
}

}  // namespace

absl::StatusOr<NodeIdentity> NodeIdentity::Open(const std::string& given, const std::string& data_dir) {
  if (!given.empty() && !IsNodeId(given)) {
    return absl::InvalidArgumentError(
        absl::StrCat("node id '", given, "' is not 1 to ", kIdBytesMax, " of a-z A-Z 0-9 . _ -"));
  }
  if (data_dir.empty()) return NodeIdentity(given.empty() ? RandomId() : given, -1);
  EDUBA_ASSIGN_OR_RETURN(const int lock, LockDirectory(data_dir));
  NodeIdentity identity("", lock);
  EDUBA_ASSIGN_OR_RETURN(identity.id_, KeptId(given, data_dir));
  return identity;
}

NodeIdentity::~NodeIdentity() {
  if (lock_ >= 0) close(lock_);
}

std::string RandomId() {
  std::random_device random;
  return absl::StrFormat("%08x%08x", random(), random());
}

}  // namespace eduba
