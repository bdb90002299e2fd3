#ifndef EDUBA_STORAGE_FILE_H_
#define EDUBA_STORAGE_FILE_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace eduba {

// Every error of this header names the path and says what to do: RESOURCE_EXHAUSTED where the disk is full,
// UNAVAILABLE for all else. Files are made readable and writable by their owner alone (0600), folders 0700.

// A file that grows at its end. Not thread-safe, but for Sync, which any thread may call.
class AppendFile {
 public:
  // Opens the file, and makes it where there is none. Writing goes on at `size`; what lies after it is cut
  // off.
  static absl::StatusOr<AppendFile> Open(const std::string& path, int64_t size);
  AppendFile(AppendFile&& other) noexcept { *this = std::move(other); }
  AppendFile& operator=(AppendFile&& other) noexcept;
  ~AppendFile();

  // Writes the pieces one after another. After an error the file is as long as before, where the disk allows.
  absl::Status Append(absl::Span<const absl::Span<const char>> pieces);
  // Makes room on the disk for `bytes` more, where the file system can promise it.
  absl::Status Reserve(int64_t bytes);
  // What was appended before is on the disk when this returns. After an error nobody knows what is there, and
  // another try would not tell (the kernel forgets that it failed): the process has to end.
  absl::Status Sync() const;
  // Cuts the file to `size` bytes, which is at most its size.
  absl::Status Truncate(int64_t size);

  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  AppendFile(std::string path, int fd, int64_t size) : path_(std::move(path)), fd_(fd), size_(size) {}

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  int64_t reserved_ = 0;  // There is room up to this size.
  int64_t sent_ = 0;      // Bytes that the kernel was asked to begin writing to the disk.
};

// The file's bytes. NOT_FOUND where there is none; FAILED_PRECONDITION where it has more than `bytes_max`.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t bytes_max);

// Puts a file with these bytes in the place of what is at `path`: wholly or not at all, also where the
// machine stops in the middle, and on the disk when this returns.
absl::Status WriteFile(const std::string& path, const std::string& bytes);

// Makes the folder, if it is not there, so that it is there after a power cut too.
absl::Status MakeFolder(const std::string& path);
// The same for a path whose first folders may be missing too.
absl::Status MakeFolders(const std::string& path);
// What was made, renamed or removed in the folder is on the disk when this returns.
absl::Status SyncFolder(const std::string& path);
// The names in the folder, sorted.
absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path);
// Removes the folder and all that is in it.
absl::Status RemoveFolder(const std::string& path);

}  // namespace eduba

#endif  // EDUBA_STORAGE_FILE_H_
