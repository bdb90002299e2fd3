#ifndef EDUBA_MODEL_READ_FILE_H_
#define EDUBA_MODEL_READ_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace eduba {

// The content of a regular file of at most `bytes_max` bytes. kNotFound when there is none; kInvalidArgument
// when it is larger or no regular file (a pipe would block).
absl::StatusOr<std::string> ReadWholeFile(const std::string& path, int64_t bytes_max);

// Opens a regular file for reading and says its size. Errors as above. The caller closes the descriptor.
struct OpenedFile {
  int fd = -1;
  int64_t bytes = 0;
};
absl::StatusOr<OpenedFile> OpenRegularFile(const std::string& path);

// Reads exactly `bytes` bytes at `offset`. kDataLoss when the file ends before that.
absl::Status ReadExactly(int fd, int64_t offset, int64_t bytes, void* out, const std::string& path);

}  // namespace eduba

#endif  // EDUBA_MODEL_READ_FILE_H_
