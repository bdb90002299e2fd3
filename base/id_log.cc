#include "base/id_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/mutex.h"
#include "base/read_at.h"
#include "base/status_macros.h"
#include "base/wire_array.h"

namespace eduba {
namespace {

constexpr int64_t kBlockBytes = IdLog::kBlockIds * static_cast<int64_t>(sizeof(int32_t));

// The process's file, in slots of one block.
class BlockFile {
 public:
  // None where the file does not take it.
  std::optional<int64_t> Write(absl::Span<const int32_t> ids) {
    const MutexLock lock(mutex_);
    if (descriptor_ < 0 && !Open()) return std::nullopt;
    int64_t slot = slots_;
    if (!free_.empty()) slot = free_.back();
    const auto* from = reinterpret_cast<const char*>(ids.data());
    for (int64_t done = 0; done < kBlockBytes;) {
      const ssize_t written = pwrite(descriptor_, from + done, kBlockBytes - done, slot * kBlockBytes + done);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) {
        Warn("write");
        return std::nullopt;
      }
      done += written;
    }
    if (free_.empty()) {
      ++slots_;
    } else {
      free_.pop_back();
    }
    return slot;
  }

  absl::Status Read(int64_t slot, int64_t first, absl::Span<int32_t> to) const {
    const absl::Span<char> bytes = AsBytes(to);
    const int64_t offset = slot * kBlockBytes + first * static_cast<int64_t>(sizeof(int32_t));
    const absl::StatusOr<int64_t> got = ReadAt(descriptor_.load(), offset, bytes);
    if (got.ok() && *got == std::ssize(bytes)) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("cannot read token ids back from the disk under ", Folder(), ": ",
                     got.ok() ? "the file was cut off" : got.status().message(), "; try again"));
  }

  void Free(int64_t slot) {
    const MutexLock lock(mutex_);
    free_.push_back(slot);
  }

 private:
  // What outlives a reboot is meant for larger files than /tmp, which may be memory.
  static std::string Folder() {
    const char* const folder = std::getenv("TMPDIR");
    if (folder != nullptr && *folder != '\0') return folder;
    return access("/var/tmp", W_OK) == 0 ? "/var/tmp" : "/tmp";
  }

  bool Open() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::string name = absl::StrCat(Folder(), "/eduba-ids-XXXXXX");
    descriptor_ = mkostemp(name.data(), O_CLOEXEC);
    if (descriptor_ < 0) {
      Warn("create a file");
      return false;
    }
    unlink(name.c_str());
    return true;
  }

  void Warn(const char* what) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (std::exchange(warned_, true)) return;
    LogWarning(absl::StrCat("cannot ", what, " under ", Folder(), ": ", std::strerror(errno),
                            "; token ids stay in memory; set TMPDIR to a folder on a disk with room"));
  }

  Mutex mutex_;
  // Set once, before the first slot is handed out, so whoever has a slot may read it without the lock.
  std::atomic<int> descriptor_ = -1;
  int64_t slots_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<int64_t> free_ ABSL_GUARDED_BY(mutex_);  // Slots below slots_ that hold nothing.
  bool warned_ ABSL_GUARDED_BY(mutex_) = false;
};

BlockFile& TheFile() {
  static auto* const file = new BlockFile();
  return *file;
}

}  // namespace

class IdLog::Block {
 public:
  explicit Block(absl::Span<const int32_t> ids) : slot_(TheFile().Write(ids)) {
    if (!slot_) ids_.assign(ids.begin(), ids.end());
  }
  ~Block() {
    if (slot_) TheFile().Free(*slot_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  absl::Status Read(int64_t first, absl::Span<int32_t> to) const {
    if (slot_) return TheFile().Read(*slot_, first, to);
    std::copy_n(ids_.begin() + first, to.size(), to.begin());
    return absl::OkStatus();
  }

 private:
  const std::optional<int64_t> slot_;
  std::vector<int32_t> ids_;  // Where there is no slot.
};

void IdLog::Append(absl::Span<const int32_t> ids) {
  while (!ids.empty()) {
    const auto room = static_cast<size_t>(kBlockIds - std::ssize(tail_));
    const absl::Span<const int32_t> some = ids.first(std::min(room, ids.size()));
    tail_.insert(tail_.end(), some.begin(), some.end());
    ids.remove_prefix(some.size());
    if (std::ssize(tail_) < kBlockIds) break;
    blocks_.push_back(std::make_shared<const Block>(tail_));
    tail_.clear();
  }
}

absl::Status IdLog::Read(int64_t begin, absl::Span<int32_t> to) const {
  EDUBA_CHECK(begin >= 0 && begin + std::ssize(to) <= size());
  while (!to.empty()) {
    const int64_t block = begin / kBlockIds;
    const int64_t first = begin % kBlockIds;
    const absl::Span<int32_t> some = to.first(std::min<size_t>(kBlockIds - first, to.size()));
    if (block < std::ssize(blocks_)) {
      EDUBA_RETURN_IF_ERROR(blocks_[block]->Read(first, some));
    } else {
      std::copy_n(tail_.begin() + first, some.size(), some.begin());
    }
    to.remove_prefix(some.size());
    begin += std::ssize(some);
  }
  return absl::OkStatus();
}

}  // namespace eduba
