#include "ingest/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"

namespace eduba {

absl::StatusOr<std::unique_ptr<AtomicFile>> AtomicFile::Create(const std::string& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat(
        path, ": found something that is no regular file, wanted a file to write; give another path"));
  }
  // The process id keeps two programs apart, O_EXCL two writers in one program.
  std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  const std::string folder = std::filesystem::path(path).parent_path().string();
  const int nameless = open(folder.empty() ? "." : folder.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0666);
  if (nameless >= 0) {
    return std::unique_ptr<AtomicFile>(new AtomicFile(path, std::move(temporary), nameless, false));
  }
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(path, ": cannot write here"));
  }
  return std::unique_ptr<AtomicFile>(new AtomicFile(path, std::move(temporary), fd, true));
}

AtomicFile::AtomicFile(std::string path, std::string temporary, int fd, bool named)
    : path_(std::move(path)), temporary_(std::move(temporary)), fd_(fd), named_(named) {}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  close(fd_);
  if (named_) unlink(temporary_.c_str());
}

absl::Status AtomicFile::Write(const void* data, size_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(fd_, next, bytes);
    if (written < 0) {
      if (errno == EINTR) continue;
      const int error = errno;
      return absl::ErrnoToStatus(error, absl::StrCat(path_, ": cannot write"));
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::Commit() {
  bool done = fsync(fd_) == 0;
  if (done && !named_) {
    // Only a rename can take the place of an older file.
    const std::string self = absl::StrCat("/proc/self/fd/", fd_);
    done = linkat(AT_FDCWD, self.c_str(), AT_FDCWD, temporary_.c_str(), AT_SYMLINK_FOLLOW) == 0;
    named_ = done;
  }
  if (!done || std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(path_, ": cannot finish the file"));
  }
  close(fd_);
  fd_ = -1;
  return absl::OkStatus();
}

}  // namespace eduba
