#ifndef EDUBA_BENCHMARKS_MEASURE_DISK_H_
#define EDUBA_BENCHMARKS_MEASURE_DISK_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// What the disk under a folder does without Eduba: the ceilings of what Eduba does with it. UNAVAILABLE with
// the system's words.

// Seconds to write a file of so many bytes in the folder, one piece after another, and to sync it once. The
// file is removed.
absl::StatusOr<double> WriteAndSync(const std::string& folder, int64_t bytes);

// Takes the folder's files out of the memory in which the system keeps what it has read of them.
absl::Status DropFromMemory(const std::string& folder);

struct ReadThrough {
  int64_t bytes = 0;
  double seconds = 0;
};
// Reads all of the folder's files from beginning to end, one after another.
absl::StatusOr<ReadThrough> ReadAll(const std::string& folder);

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_DISK_H_
