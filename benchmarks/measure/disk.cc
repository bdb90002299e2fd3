#include "benchmarks/measure/disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "benchmarks/measure/timing.h"

namespace eduba {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;

absl::Status Failed(const std::string& path) {
  return absl::UnavailableError(absl::StrCat("bench: ", path, ": ", std::strerror(errno)));
}

absl::Status ForEachFile(const std::string& folder,
                         const std::function<absl::Status(int fd, const std::string& path)>& visit) {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const std::string path = entry.path().string();
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return Failed(path);
    absl::Status status = visit(fd, path);
    close(fd);
    EDUBA_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<double> WriteAndSync(const std::string& folder, int64_t bytes) {
  const std::string path = absl::StrCat(folder, "/bench-write");
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return Failed(path);
  // Bytes that no file system can leave out.
  std::vector<char> piece(kPieceBytes);
  for (size_t i = 0; i < piece.size(); ++i) piece[i] = static_cast<char>(i * 2654435761U >> 13);
  absl::Status status;
  const double seconds = Seconds([&] {
    for (int64_t done = 0; done < bytes && status.ok();) {
      const ssize_t count = write(fd, piece.data(), static_cast<size_t>(std::min(kPieceBytes, bytes - done)));
      if (count <= 0) {
        status = Failed(path);
        break;
      }
      (void)sync_file_range(fd, done, count, SYNC_FILE_RANGE_WRITE);
      done += count;
    }
    if (status.ok() && fdatasync(fd) != 0) status = Failed(path);
  });
  close(fd);
  unlink(path.c_str());
  EDUBA_RETURN_IF_ERROR(status);
  return seconds;
}

absl::Status DropFromMemory(const std::string& folder) {
  return ForEachFile(folder, [](int fd, const std::string& path) {
    if (fdatasync(fd) != 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) return Failed(path);
    return absl::OkStatus();
  });
}

absl::StatusOr<ReadThrough> ReadAll(const std::string& folder) {
  ReadThrough result;
  std::vector<char> piece(kPieceBytes);
  absl::Status status;
  result.seconds = Seconds([&] {
    status = ForEachFile(folder, [&](int fd, const std::string& path) {
      while (true) {
        const ssize_t count = read(fd, piece.data(), piece.size());
        if (count < 0) return Failed(path);
        if (count == 0) return absl::OkStatus();
        result.bytes += count;
      }
    });
  });
  EDUBA_RETURN_IF_ERROR(status);
  return result;
}

}  // namespace eduba
