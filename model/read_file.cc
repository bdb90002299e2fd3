#include "model/read_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/read_at.h"
#include "base/status_macros.h"

namespace eduba {

absl::StatusOr<OpenedFile> OpenRegularFile(const std::string& path) {
  // O_NONBLOCK: opening a pipe returns at once, to be refused.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    const std::string what = absl::StrCat(path, ": ", std::strerror(error));
    if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(what);
    if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(what);
    return absl::InvalidArgumentError(what);
  }
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  return OpenedFile{fd, static_cast<int64_t>(info.st_size)};
}

absl::Status ReadExactly(int fd, int64_t offset, int64_t bytes, void* out, const std::string& path) {
  const absl::StatusOr<int64_t> got = ReadAt(fd, offset, absl::MakeSpan(static_cast<char*>(out), bytes));
  if (!got.ok()) return absl::DataLossError(absl::StrCat(path, ": ", got.status().message()));
  if (*got < bytes) {
    return absl::DataLossError(absl::StrCat(path, ": ends before byte ", offset + bytes));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadWholeFile(const std::string& path, int64_t bytes_max) {
  EDUBA_ASSIGN_OR_RETURN(const OpenedFile file, OpenRegularFile(path));
  if (file.bytes > bytes_max) {
    close(file.fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", file.bytes, " bytes, at most ", bytes_max,
                                                   " are read; is this the right file?"));
  }
  std::string text(static_cast<size_t>(file.bytes), '\0');
  const absl::Status read = ReadExactly(file.fd, 0, file.bytes, text.data(), path);
  close(file.fd);
  if (!read.ok()) return read;
  return text;
}

}  // namespace eduba
