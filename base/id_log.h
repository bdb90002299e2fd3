#ifndef EDUBA_BASE_ID_LOG_H_
#define EDUBA_BASE_ID_LOG_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace eduba {

// Token ids that only become more, in constant memory: whole blocks of them lie in a file without a name, in
// $TMPDIR or else /var/tmp (or /tmp), which all logs of the process share and which ends with it. Blocks that
// the file does not take, because the disk is full or absent, stay in memory (and a warning says so once). A
// copy shares what has been written, and costs some bytes for each block. Different logs may be used at once,
// by different threads.
class IdLog {
 public:
  static constexpr int64_t kBlockIds = 1 << 14;

  int64_t size() const { return static_cast<int64_t>(blocks_.size()) * kBlockIds + std::ssize(tail_); }
  void Append(absl::Span<const int32_t> ids);
  // Ids [begin, begin + to.size()). REQUIRES: they are there. UNAVAILABLE where the disk does not give them.
  absl::Status Read(int64_t begin, absl::Span<int32_t> to) const;

 private:
  class Block;

  std::vector<std::shared_ptr<const Block>> blocks_;
  std::vector<int32_t> tail_;  // Fewer than a block.
};

}  // namespace eduba

#endif  // EDUBA_BASE_ID_LOG_H_
