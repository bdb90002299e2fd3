#ifndef EDUBA_INGEST_NPY_H_
#define EDUBA_INGEST_NPY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "ingest/atomic_file.h"

namespace eduba {

// NumPy's .npy files, versions 1 to 3, in C order and little-endian: what np.save writes on any machine that
// Eduba runs on.

// The element types that are read. What else numpy can store (objects, strings, records, complex, big-endian)
// is refused.
enum class NpyType : uint8_t { kBool, kI8, kI16, kI32, kI64, kU8, kU16, kU32, kU64, kF16, kF32, kF64 };

// Bytes of one element.
size_t NpyTypeBytes(NpyType type);
// NumPy's name: "float32", "int64", "bool".
const char* NpyTypeName(NpyType type);
// "(3, 4)", as NumPy prints it.
std::string NpyShapeText(absl::Span<const int64_t> shape);

// The NpyType of a C++ type.
template <typename T>
constexpr NpyType NpyTypeOf() {
  if constexpr (std::is_same_v<T, float>) {
    return NpyType::kF32;
  } else if constexpr (std::is_same_v<T, double>) {
    return NpyType::kF64;
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return NpyType::kI32;
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    return NpyType::kU8;
  } else {
    static_assert(std::is_same_v<T, int64_t>, "no such NpyType");
    return NpyType::kI64;
  }
}

// What a file's first bytes say about it.
struct NpyHeader {
  NpyType type = NpyType::kF32;
  std::vector<int64_t> shape;  // Empty: one element.
  int64_t elements = 0;        // The product of `shape`.
  int64_t data_offset = 0;     // Where the elements begin, in bytes from the start of the file.
};

// Longest header that is read, in bytes. NumPy's own for the types above stay below 200.
inline constexpr int64_t kNpyHeaderBytesMax = 65536;

// Reads the header of a file of `file_bytes` bytes that begins with `start`, its first min(file_bytes,
// kNpyHeaderBytesMax) bytes, and checks that the elements fill the rest of the file exactly. `name` begins
// the error messages. kInvalidArgument for all that is wrong.
absl::StatusOr<NpyHeader> ParseNpyHeader(absl::Span<const uint8_t> start, int64_t file_bytes,
                                         const std::string& name);

// An open .npy file. Elements are read as they are asked for, so it may be larger than memory. Reads do not
// move a cursor: one NpyFile may be read from many threads at once.
class NpyFile {
 public:
  // kNotFound when there is no such file; kInvalidArgument when it is not an .npy file that can be read
  // (above).
  static absl::StatusOr<std::unique_ptr<NpyFile>> Open(const std::string& path);
  ~NpyFile();
  NpyFile(const NpyFile&) = delete;
  NpyFile& operator=(const NpyFile&) = delete;

  const std::string& path() const { return path_; }
  NpyType type() const { return header_.type; }
  const std::vector<int64_t>& shape() const { return header_.shape; }
  int64_t elements() const { return header_.elements; }

  // kInvalidArgument unless the type is one of `types` and the shape is `shape`, in which -1 stands for any
  // size. `what` says in the message what the axes mean, for example "[tokens, kv_heads, head_dim]".
  absl::Status Expect(const std::vector<NpyType>& types, const std::vector<int64_t>& shape,
                      const std::string& what) const;

  // Copies elements [begin, begin + count), counted in C order, to `out`, as they are stored: count *
  // NpyTypeBytes(type()) bytes. kDataLoss when the file has become shorter since it was opened. REQUIRES: the
  // range lies in the array.
  absl::Status Read(int64_t begin, int64_t count, void* out) const;

  // The whole array. kInvalidArgument when its type is another than T.
  template <typename T>
  absl::StatusOr<std::vector<T>> ReadAll() const;

 private:
  NpyFile(std::string path, int fd, NpyHeader header);

  std::string path_;
  int fd_;
  NpyHeader header_;
};

// Writes an .npy file (version 1) from pieces that arrive in order. Nothing is at `path` before Finish().
class NpyWriter {
 public:
  // Errors as AtomicFile::Create.
  static absl::StatusOr<std::unique_ptr<NpyWriter>> Create(const std::string& path, NpyType type,
                                                           const std::vector<int64_t>& shape);

  // Appends data.size() elements in C order. REQUIRES: T is the file's type, and no more come than `shape`
  // holds.
  template <typename T>
  absl::Status Append(absl::Span<const T> data);

  // REQUIRES: every element has been appended.
  absl::Status Finish();

 private:
  NpyWriter(std::unique_ptr<AtomicFile> file, NpyType type, int64_t elements);

  absl::Status AppendBytes(const void* data, NpyType type, int64_t count);

  std::unique_ptr<AtomicFile> file_;
  NpyType type_;
  int64_t missing_;  // Elements still to come.
};

// Writes a whole array. REQUIRES: data.size() is the product of `shape`.
template <typename T>
absl::Status WriteNpy(const std::string& path, const std::vector<int64_t>& shape, absl::Span<const T> data);

// Which rows of a table with `rows` rows a file lists: a one-dimensional array of any integer type, of row
// numbers from 0 (kept in their order, repeats and all), or of `rows` booleans (true: take the row).
// kOutOfRange for a number outside [0, rows); other errors as NpyFile::Open.
absl::StatusOr<std::vector<int64_t>> ReadRowList(const std::string& path, int64_t rows);

// --- only templates below ---

template <typename T>
absl::StatusOr<std::vector<T>> NpyFile::ReadAll() const {
  absl::Status expected = Expect({NpyTypeOf<T>()}, shape(), "");
  if (!expected.ok()) return expected;
  std::vector<T> out(static_cast<size_t>(elements()));
  absl::Status read = Read(0, elements(), out.data());
  if (!read.ok()) return read;
  return out;
}

template <typename T>
absl::Status NpyWriter::Append(absl::Span<const T> data) {
  return AppendBytes(data.data(), NpyTypeOf<T>(), static_cast<int64_t>(data.size()));
}

template <typename T>
absl::Status WriteNpy(const std::string& path, const std::vector<int64_t>& shape, absl::Span<const T> data) {
  auto writer = NpyWriter::Create(path, NpyTypeOf<T>(), shape);
  if (!writer.ok()) return writer.status();
  absl::Status appended = (*writer)->Append(data);
  if (!appended.ok()) return appended;
  return (*writer)->Finish();
}

}  // namespace eduba

#endif  // EDUBA_INGEST_NPY_H_
