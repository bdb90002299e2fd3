#ifndef EDUBA_INGEST_ATOMIC_FILE_H_
#define EDUBA_INGEST_ATOMIC_FILE_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// A file that appears at `path` whole or not at all: written without a name (where the file system cannot,
// beside `path` under a temporary one), synced, then moved there. Destroyed before Commit(), or in a program
// that is killed, it leaves nothing behind and an older file at `path` as it was.
class AtomicFile {
 public:
  // kNotFound: the folder does not exist. kFailedPrecondition: `path` exists and is no regular file (a rename
  // would replace a device or a folder).
  static absl::StatusOr<std::unique_ptr<AtomicFile>> Create(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  absl::Status Write(const void* data, size_t bytes);
  absl::Status Write(const std::string& text) { return Write(text.data(), text.size()); }

  // The file is at `path`, with all its bytes on the disk, once this returns OK. Call it once.
  absl::Status Commit();

 private:
  AtomicFile(std::string path, std::string temporary, int fd, bool named);

  std::string path_;
  std::string temporary_;
  int fd_;
  bool named_;  // There is a file `temporary_`.
};

}  // namespace eduba

#endif  // EDUBA_INGEST_ATOMIC_FILE_H_
