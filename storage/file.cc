#include "storage/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "base/read_at.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// The kernel is asked to write to the disk whenever so much has come, so that a sync has little left to do.
constexpr int64_t kSendBytes = int64_t{8} << 20;

constexpr int64_t kReserveBytes = int64_t{64} << 10;

absl::Status SystemError(int error, const std::string& path, const char* doing) {
  const std::string text = absl::StrCat("cannot ", doing, " ", path, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    return absl::ResourceExhaustedError(absl::StrCat(text, "; free some space on that disk"));
  }
  return absl::UnavailableError(absl::StrCat(text, "; look after that disk or folder"));
}

std::string FolderOf(const std::string& path) { return std::filesystem::path(path).parent_path().string(); }

absl::Status WriteAt(int fd, int64_t offset, absl::Span<const char> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t count = pwrite(fd, bytes.data(), bytes.size(), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return SystemError(count == 0 ? ENOSPC : errno, path, "write to");
    bytes.remove_prefix(static_cast<size_t>(count));
    offset += count;
  }
  return absl::OkStatus();
}

// A file descriptor that is closed at the end.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

}  // namespace

absl::StatusOr<AppendFile> AppendFile::Open(const std::string& path, int64_t size) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return SystemError(errno, path, "open");
  AppendFile file(path, fd, size);
  if (ftruncate(fd, size) != 0) return SystemError(errno, path, "cut");
  file.sent_ = size;
  return file;
}

AppendFile& AppendFile::operator=(AppendFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(reserved_, other.reserved_);
  std::swap(sent_, other.sent_);
  return *this;
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status AppendFile::Append(absl::Span<const absl::Span<const char>> pieces) {
  int64_t end = size_;
  for (const absl::Span<const char> piece : pieces) {
    const absl::Status status = WriteAt(fd_, end, piece, path_);
    if (!status.ok()) {
      // Best effort: whoever reads the file again stops at a frame that is not whole.
      (void)!ftruncate(fd_, size_);
      return status;
    }
    end += static_cast<int64_t>(piece.size());
  }
  size_ = end;
  if (size_ - sent_ >= kSendBytes) {
    (void)sync_file_range(fd_, sent_, size_ - sent_, SYNC_FILE_RANGE_WRITE);
    sent_ = size_;
  }
  return absl::OkStatus();
}

absl::Status AppendFile::Reserve(int64_t bytes) {
  if (size_ + bytes <= reserved_) return absl::OkStatus();
  // More than asked for, so that small steps do not ask every time.
  const int64_t more = std::max(bytes, kReserveBytes);
  if (fallocate(fd_, FALLOC_FL_KEEP_SIZE, size_, more) == 0) {
    reserved_ = size_ + more;
    return absl::OkStatus();
  }
  return errno == EOPNOTSUPP ? absl::OkStatus() : SystemError(errno, path_, "make room in");
}

absl::Status AppendFile::Sync() const {
  return fdatasync(fd_) == 0 ? absl::OkStatus() : SystemError(errno, path_, "sync");
}

absl::Status AppendFile::Truncate(int64_t size) {
  if (ftruncate(fd_, size) != 0) return SystemError(errno, path_, "cut");
  size_ = size;
  reserved_ = 0;
  sent_ = std::min(sent_, size);
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t bytes_max) {
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0 && errno == ENOENT) return absl::NotFoundError(absl::StrCat("there is no ", path));
  if (file.get() < 0) return SystemError(errno, path, "open");
  std::string bytes(static_cast<size_t>(bytes_max) + 1, '\0');
  const absl::StatusOr<int64_t> count = ReadAt(file.get(), 0, absl::MakeSpan(bytes.data(), bytes.size()));
  if (!count.ok()) return Annotate(count.status(), absl::StrCat("cannot read ", path));
  if (*count > bytes_max) {
    return absl::FailedPreconditionError(absl::StrCat(path, " has more than ", bytes_max, " bytes"));
  }
  bytes.resize(static_cast<size_t>(*count));
  return bytes;
}

absl::Status WriteFile(const std::string& path, const std::string& bytes) {
  const std::string part = absl::StrCat(path, ".part");
  {
    const Descriptor file(open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (file.get() < 0) return SystemError(errno, part, "open");
    EDUBA_RETURN_IF_ERROR(WriteAt(file.get(), 0, bytes, part));
    if (fsync(file.get()) != 0) return SystemError(errno, part, "sync");
  }
  if (rename(part.c_str(), path.c_str()) != 0) return SystemError(errno, path, "write");
  return SyncFolder(FolderOf(path));
}

absl::Status MakeFolder(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0) {
    const int error = errno;
    struct stat info {};
    const bool is_folder = stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
    return error == EEXIST && is_folder ? absl::OkStatus() : SystemError(error, path, "make the folder");
  }
  return SyncFolder(FolderOf(path));
}

absl::Status MakeFolders(const std::string& path) {
  struct stat info {};
  if (path.empty() || stat(path.c_str(), &info) == 0) return MakeFolder(path.empty() ? "." : path);
  EDUBA_RETURN_IF_ERROR(MakeFolders(FolderOf(path)));
  return MakeFolder(path);
}

absl::Status SyncFolder(const std::string& path) {
  const Descriptor folder(open(path.empty() ? "." : path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0) return SystemError(errno, path, "open");
  return fsync(folder.get()) == 0 ? absl::OkStatus() : SystemError(errno, path, "sync");
}

absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path, error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  if (error) return SystemError(error.value(), path, "list");
  std::sort(names.begin(), names.end());
  return names;
}

absl::Status RemoveFolder(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  return error ? SystemError(error.value(), path, "remove") : absl::OkStatus();
}

}  // namespace eduba
