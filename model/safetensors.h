#ifndef EDUBA_MODEL_SAFETENSORS_H_
#define EDUBA_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"

namespace eduba {

// The safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON
// header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. Files are taken as
// hostile.

// Limits, far above what models need: a 27-billion-parameter Gemma has 508 tensors in 60 KB of headers.
inline constexpr int64_t kSafetensorsHeaderBytesMax = int64_t{1} << 20;
inline constexpr int64_t kSafetensorsTensorsMax = 4096;
inline constexpr int kSafetensorsRankMax = 8;
inline constexpr int64_t kSafetensorsShardsMax = 1024;

// What a header says of one tensor.
struct StoredTensor {
  std::string dtype;           // The format's own name: "F32", "BF16", "F16", "BOOL", ...
  std::vector<int64_t> shape;  // Empty: one element. Every dimension >= 1.
  int64_t begin = 0;           // First byte, counted from the first byte after the header.
  int64_t bytes = 0;           // elements * bytes of dtype
};

struct SafetensorsHeader {
  std::map<std::string, StoredTensor> tensors;
  int64_t data_offset = 0;  // Where the first tensor byte lies in the file.
};

// Reads the header of a file of `file_bytes` bytes that begins with `start`, its first min(file_bytes, 8 +
// kSafetensorsHeaderBytesMax) bytes. Checks all that can be checked: lengths, every tensor's shape times
// dtype against its offsets without overflow, that tensors tile the data exactly (no overlap, no hole,
// nothing after them), and that no name appears twice. kInvalidArgument; `name` begins the message.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const uint8_t> start, int64_t file_bytes,
                                                         const std::string& name);

// A tensor in a mapped file. Borrowed: valid as long as its Safetensors.
struct MappedTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // Aligned to the size of an element.
  int64_t bytes = 0;
  std::string file;  // Its path, for messages.
};

// The tensors of one file, or of all shards of an index, mapped read-only: they cost no memory of their own
// until they are read, and several processes share one copy.
//
// A file that is truncated while it is mapped kills the process at the next read (SIGBUS): nothing else in
// Unix is possible with a mapping. Keep model folders read-only; CheckUnchanged() notices in between.
class Safetensors {
 public:
  // `folder`/model.safetensors if it is there, else the shards that `folder`/model.safetensors.index.json
  // names; the index and the shards must agree on every tensor. kNotFound when there is neither.
  static absl::StatusOr<std::unique_ptr<Safetensors>> Open(const std::string& folder);
  ~Safetensors();
  Safetensors(const Safetensors&) = delete;
  Safetensors& operator=(const Safetensors&) = delete;

  // Ordered by name.
  const std::map<std::string, MappedTensor>& tensors() const { return tensors_; }
  // Bytes of all tensors.
  int64_t bytes() const;

  // kDataLoss when a file is not as it was when it was opened (size or time of last change).
  absl::Status CheckUnchanged() const;

 private:
  struct File {
    std::string path;
    int fd = -1;
    int64_t bytes = 0;
    int64_t changed_ns = 0;
    void* memory = nullptr;  // The mapping (or a copy, of a file whose data is not aligned).
    int64_t memory_bytes = 0;
  };

  Safetensors() = default;
  // Maps one file and takes its tensors in; a name that is there already is an error.
  absl::Status Add(const std::string& path);

  std::vector<File> files_;
  std::map<std::string, MappedTensor> tensors_;
};

// The DType of a stored dtype; nullopt for those that weights cannot have.
std::optional<DType> WeightDType(const std::string& stored);

// "[2, 3]".
std::string ShapeText(absl::Span<const int64_t> shape);

}  // namespace eduba

#endif  // EDUBA_MODEL_SAFETENSORS_H_
