#include "ingest/npy.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/read_at.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr int kMagicBytes = 6;
// NumPy's own limit.
constexpr size_t kAxesMax = 32;

struct TypeRow {
  NpyType type;
  size_t bytes;
  const char* name;
  const char* descr;  // The name that the header has, without the byte order.
};
constexpr TypeRow kTypes[] = {
    {NpyType::kBool, 1, "bool", "b1"},   {NpyType::kI8, 1, "int8", "i1"},
    {NpyType::kI16, 2, "int16", "i2"},   {NpyType::kI32, 4, "int32", "i4"},
    {NpyType::kI64, 8, "int64", "i8"},   {NpyType::kU8, 1, "uint8", "u1"},
    {NpyType::kU16, 2, "uint16", "u2"},  {NpyType::kU32, 4, "uint32", "u4"},
    {NpyType::kU64, 8, "uint64", "u8"},  {NpyType::kF16, 2, "float16", "f2"},
    {NpyType::kF32, 4, "float32", "f4"}, {NpyType::kF64, 8, "float64", "f8"},
};

const TypeRow& RowOf(NpyType type) { return kTypes[static_cast<size_t>(type)]; }

// What the header's dictionary says, before any of it is believed.
struct RawHeader {
  std::string descr;
  bool structured = false;  // `descr` is a list of fields.
  bool fortran_order = false;
  std::vector<int64_t> shape;
};

// Reads the Python literal {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }: its keys in any
// order, every key once.
class HeaderParser {
 public:
  explicit HeaderParser(absl::Span<const uint8_t> text) : text_(text) {}

  absl::StatusOr<RawHeader> Parse() {
    RawHeader header;
    bool has_descr = false;
    bool has_order = false;
    bool has_shape = false;
    EDUBA_RETURN_IF_ERROR(Want('{'));
    while (!Take('}')) {
      EDUBA_ASSIGN_OR_RETURN(const std::string key, ParseString());
      EDUBA_RETURN_IF_ERROR(Want(':'));
      bool* seen = nullptr;
      if (key == "descr") {
        seen = &has_descr;
        EDUBA_RETURN_IF_ERROR(ParseDescr(header));
        if (header.structured) return header;
      } else if (key == "fortran_order") {
        seen = &has_order;
        EDUBA_ASSIGN_OR_RETURN(header.fortran_order, ParseBool());
      } else if (key == "shape") {
        seen = &has_shape;
        EDUBA_ASSIGN_OR_RETURN(header.shape, ParseShape());
      } else {
        return Broken("an unknown key");
      }
      if (*seen) return Broken("a key twice");
      *seen = true;
      if (!Take(',')) {
        EDUBA_RETURN_IF_ERROR(Want('}'));
        break;
      }
    }
    if (!has_descr || !has_order || !has_shape) return Broken("no 'descr', 'fortran_order' or 'shape'");
    SkipSpace();
    if (at_ != text_.size()) return Broken("more text after the dictionary");
    return header;
  }

 private:
  absl::Status Broken(const std::string& found) const {
    return absl::InvalidArgumentError(
        absl::StrCat("the header is broken: found ", found, " at byte ", at_,
                     " of it, wanted NumPy's {'descr', 'fortran_order', 'shape'}"));
  }

  void SkipSpace() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool Take(char wanted) {
    SkipSpace();
    if (at_ == text_.size() || text_[at_] != static_cast<uint8_t>(wanted)) return false;
    ++at_;
    return true;
  }

  absl::Status Want(char wanted) {
    if (Take(wanted)) return absl::OkStatus();
    return Broken(absl::StrCat("no '", std::string(1, wanted), "'"));
  }

  bool TakeWord(const char* word) {
    SkipSpace();
    const size_t size = std::strlen(word);
    if (text_.size() - at_ < size || std::memcmp(text_.data() + at_, word, size) != 0) return false;
    at_ += size;
    return true;
  }

  absl::StatusOr<std::string> ParseString() {
    SkipSpace();
    if (at_ == text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return Broken("no string");
    const uint8_t quote = text_[at_++];
    std::string out;
    for (; at_ < text_.size() && text_[at_] != quote; ++at_) {
      if (text_[at_] < 0x20 || text_[at_] > 0x7e) return Broken("a character that is not printable ASCII");
      out.push_back(static_cast<char>(text_[at_]));
    }
    if (at_ == text_.size()) return Broken("a string without an end");
    ++at_;
    return out;
  }

  absl::Status ParseDescr(RawHeader& header) {
    if (Take('[')) {
      header.structured = true;
      return absl::OkStatus();
    }
    EDUBA_ASSIGN_OR_RETURN(header.descr, ParseString());
    return absl::OkStatus();
  }

  absl::StatusOr<bool> ParseBool() {
    if (TakeWord("True")) return true;
    if (TakeWord("False")) return false;
    return Broken("neither True nor False");
  }

  absl::StatusOr<std::vector<int64_t>> ParseShape() {
    std::vector<int64_t> shape;
    EDUBA_RETURN_IF_ERROR(Want('('));
    while (!Take(')')) {
      EDUBA_ASSIGN_OR_RETURN(const int64_t size, ParseSize());
      if (shape.size() == kAxesMax) return Broken("more than 32 axes");
      shape.push_back(size);
      if (!Take(',')) {
        EDUBA_RETURN_IF_ERROR(Want(')'));
        break;
      }
    }
    return shape;
  }

  absl::StatusOr<int64_t> ParseSize() {
    SkipSpace();
    const size_t begin = at_;
    int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (__builtin_mul_overflow(value, int64_t{10}, &value) ||
          __builtin_add_overflow(value, int64_t{text_[at_]} - '0', &value)) {
        return Broken("a size beyond 64 bits");
      }
    }
    if (at_ == begin) return Broken("no size");
    if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // Python 2 wrote its long integers so.
    return value;
  }

  absl::Span<const uint8_t> text_;
  size_t at_ = 0;
};

absl::StatusOr<NpyType> TypeFromDescr(const std::string& descr) {
  const std::string fix = "; save it again with numpy.save(path, array.astype(numpy.float32))";
  if (descr.size() >= 2) {
    for (const TypeRow& row : kTypes) {
      if (descr.substr(1) != row.descr) continue;
      if (descr[0] == '>' && row.bytes > 1) {
        return absl::InvalidArgumentError(
            absl::StrCat("found big-endian ", row.name, ", wanted little-endian", fix));
      }
      if (std::strchr("<|=>", descr[0]) != nullptr) return row.type;
    }
    const std::string kind = descr.substr(descr[0] == '<' || descr[0] == '>' || descr[0] == '|' ? 1 : 0, 1);
    if (kind == "O") {
      return absl::InvalidArgumentError(absl::StrCat("found Python objects, wanted numbers", fix));
    }
    if (kind == "U" || kind == "S") {
      return absl::InvalidArgumentError(absl::StrCat("found strings ('", descr, "'), wanted numbers"));
    }
    if (kind == "V") {
      return absl::InvalidArgumentError(
          absl::StrCat("found raw bytes ('", descr, "': so NumPy saves bfloat16), wanted numbers", fix));
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "found elements of type '", descr, "', wanted a boolean, integer or float of up to 64 bits", fix));
}

// The header without the file's name in front of its errors.
absl::StatusOr<NpyHeader> ParseUnnamed(absl::Span<const uint8_t> start, int64_t file_bytes) {
  const size_t fixed = kMagicBytes + 2;
  if (start.size() < fixed + 2 || std::memcmp(start.data(), kMagic, kMagicBytes) != 0) {
    return absl::InvalidArgumentError(
        "not an .npy file: it does not begin with NumPy's signature; write it with numpy.save");
  }
  const int version = start[kMagicBytes];
  if (version < 1 || version > 3) {
    return absl::InvalidArgumentError(absl::StrCat("found .npy version ", version, ", wanted 1, 2 or 3"));
  }
  const size_t length_bytes = version == 1 ? 2 : 4;
  if (start.size() < fixed + length_bytes) {
    return absl::InvalidArgumentError("truncated inside its header; write the file again");
  }
  int64_t length = 0;
  for (size_t i = 0; i < length_bytes; ++i) length |= int64_t{start[fixed + i]} << (8 * i);
  const int64_t data_offset = static_cast<int64_t>(fixed + length_bytes) + length;
  if (data_offset > kNpyHeaderBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("found a header of ", length, " bytes, wanted at most ",
                                                   kNpyHeaderBytesMax, " with its length"));
  }
  if (data_offset > static_cast<int64_t>(start.size())) {
    return absl::InvalidArgumentError(absl::StrCat("truncated inside its header: found ", file_bytes,
                                                   " bytes, wanted ", data_offset,
                                                   " or more; write the file again"));
  }
  HeaderParser parser(start.subspan(fixed + length_bytes, static_cast<size_t>(length)));
  EDUBA_ASSIGN_OR_RETURN(RawHeader raw, parser.Parse());
  if (raw.structured) {
    return absl::InvalidArgumentError(
        "found records with named fields, wanted plain numbers; save one field, array['name']");
  }
  NpyHeader header;
  EDUBA_ASSIGN_OR_RETURN(header.type, TypeFromDescr(raw.descr));
  if (raw.fortran_order) {
    return absl::InvalidArgumentError(
        "found Fortran order, wanted C order; save it again with numpy.save(path, "
        "numpy.ascontiguousarray(array))");
  }
  header.shape = std::move(raw.shape);
  header.data_offset = data_offset;

  // The product of the axes that are not zero must fit, too: later code multiplies some of them.
  int64_t bytes = static_cast<int64_t>(NpyTypeBytes(header.type));
  header.elements = 1;
  for (const int64_t size : header.shape) {
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("found shape ", NpyShapeText(header.shape),
                       ", which is more than 2^63 bytes; the header is broken"));
    }
    header.elements *= size;
  }
  const int64_t wanted = header.elements * static_cast<int64_t>(NpyTypeBytes(header.type));
  const int64_t found = file_bytes - data_offset;
  if (found != wanted) {
    return absl::InvalidArgumentError(absl::StrCat(
        found < wanted ? "truncated" : "too long", ": found ", found, " bytes of elements, wanted ", wanted,
        " (", NpyTypeName(header.type), " ", NpyShapeText(header.shape), "); write the file again"));
  }
  return header;
}

// Reads exactly `bytes` bytes at `offset`.
absl::Status ReadFully(int fd, int64_t offset, int64_t bytes, void* out, const std::string& path) {
  const absl::StatusOr<int64_t> got = ReadAt(fd, offset, absl::MakeSpan(static_cast<char*>(out), bytes));
  if (!got.ok()) {
    return absl::Status(got.status().code(), absl::StrCat(path, ": cannot read: ", got.status().message()));
  }
  if (*got < bytes) {
    return absl::DataLossError(absl::StrCat(path, ": ended at byte ", offset + *got, ", wanted ",
                                            bytes - *got, " more; it was changed while it was read"));
  }
  return absl::OkStatus();
}

// Appends to `rows` the numbers that `values` holds, or, for booleans, where they are true.
template <typename T>
absl::Status AppendRowNumbers(const std::vector<T>& values, int64_t first, int64_t limit,
                              const std::string& path, std::vector<int64_t>& rows) {
  for (size_t i = 0; i < values.size(); ++i) {
    const bool in_range =
        values[i] >= T{0} && static_cast<uint64_t>(values[i]) < static_cast<uint64_t>(limit);
    if (!in_range) {
      return absl::OutOfRangeError(absl::StrCat(path, ": found row ", +values[i], " at index ",
                                                first + static_cast<int64_t>(i),
                                                ", wanted rows from 0 to below ", limit));
    }
    rows.push_back(static_cast<int64_t>(values[i]));
  }
  return absl::OkStatus();
}

constexpr int64_t kRowListBlock = 1 << 16;  // Elements read at a time.

template <typename T>
absl::Status ReadRowNumbers(const NpyFile& file, int64_t limit, std::vector<int64_t>& rows) {
  for (int64_t begin = 0; begin < file.elements(); begin += kRowListBlock) {
    std::vector<T> values(static_cast<size_t>(std::min(kRowListBlock, file.elements() - begin)));
    EDUBA_RETURN_IF_ERROR(file.Read(begin, static_cast<int64_t>(values.size()), values.data()));
    EDUBA_RETURN_IF_ERROR(AppendRowNumbers(values, begin, limit, file.path(), rows));
  }
  return absl::OkStatus();
}

absl::Status ReadRowMask(const NpyFile& file, int64_t limit, std::vector<int64_t>& rows) {
  if (file.elements() != limit) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": found ", file.elements(),
                                                   " booleans, wanted one for each of ", limit, " rows"));
  }
  std::vector<uint8_t> mask(static_cast<size_t>(limit));
  EDUBA_RETURN_IF_ERROR(file.Read(0, limit, mask.data()));
  for (int64_t i = 0; i < limit; ++i) {
    if (mask[static_cast<size_t>(i)] != 0) rows.push_back(i);
  }
  return absl::OkStatus();
}

}  // namespace

size_t NpyTypeBytes(NpyType type) { return RowOf(type).bytes; }

const char* NpyTypeName(NpyType type) { return RowOf(type).name; }

std::string NpyShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("(", absl::StrJoin(shape, ", "), shape.size() == 1 ? ",)" : ")");
}

absl::StatusOr<NpyHeader> ParseNpyHeader(absl::Span<const uint8_t> start, int64_t file_bytes,
                                         const std::string& name) {
  auto header = ParseUnnamed(start, file_bytes);
  if (!header.ok()) return Annotate(header.status(), name);
  return header;
}

absl::StatusOr<std::unique_ptr<NpyFile>> NpyFile::Open(const std::string& path) {
  // Not to wait for a pipe's writer: what is no regular file is refused below.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(path, ": cannot open"));
  }
  std::unique_ptr<NpyFile> file(new NpyFile(path, fd, NpyHeader{}));  // Closes `fd` on every way out.
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": found something that is no regular file, wanted an .npy file"));
  }
  const int64_t file_bytes = info.st_size;
  std::vector<uint8_t> start(static_cast<size_t>(std::min(file_bytes, kNpyHeaderBytesMax)));
  EDUBA_RETURN_IF_ERROR(ReadFully(fd, 0, static_cast<int64_t>(start.size()), start.data(), path));
  EDUBA_ASSIGN_OR_RETURN(file->header_, ParseNpyHeader(start, file_bytes, path));
  return file;
}

NpyFile::NpyFile(std::string path, int fd, NpyHeader header)
    : path_(std::move(path)), fd_(fd), header_(std::move(header)) {}

NpyFile::~NpyFile() { close(fd_); }

absl::Status NpyFile::Expect(const std::vector<NpyType>& types, const std::vector<int64_t>& shape,
                             const std::string& what) const {
  if (std::find(types.begin(), types.end(), type()) == types.end()) {
    const std::string wanted = absl::StrJoin(
        types, " or ", [](std::string* out, NpyType type) { absl::StrAppend(out, NpyTypeName(type)); });
    return absl::InvalidArgumentError(absl::StrCat(path_, ": found ", NpyTypeName(type()), ", wanted ",
                                                   wanted, "; convert it with array.astype(numpy.",
                                                   NpyTypeName(types[0]), ")"));
  }
  bool fits = shape.size() == header_.shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == header_.shape[i];
  if (fits) return absl::OkStatus();
  const std::string wanted = absl::StrJoin(shape, ", ", [](std::string* out, int64_t size) {
    absl::StrAppend(out, size < 0 ? "any" : absl::StrCat(size));
  });
  return absl::InvalidArgumentError(
      absl::StrCat(path_, ": found shape ", NpyShapeText(header_.shape), ", wanted (", wanted, ") ", what));
}

absl::Status NpyFile::Read(int64_t begin, int64_t count, void* out) const {
  EDUBA_CHECK(begin >= 0 && count >= 0 && begin <= elements() && count <= elements() - begin);
  const auto bytes = static_cast<int64_t>(NpyTypeBytes(type()));
  return ReadFully(fd_, header_.data_offset + begin * bytes, count * bytes, out, path_);
}

absl::StatusOr<std::unique_ptr<NpyWriter>> NpyWriter::Create(const std::string& path, NpyType type,
                                                             const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) {
    EDUBA_CHECK(size >= 0);
    EDUBA_CHECK(!__builtin_mul_overflow(elements, size, &elements));
  }
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<AtomicFile> file, AtomicFile::Create(path));
  const TypeRow& row = RowOf(type);
  std::string text = absl::StrCat("{'descr': '", row.bytes == 1 ? "|" : "<", row.descr,
                                  "', 'fortran_order': False, 'shape': ", NpyShapeText(shape), ", }");
  // The elements begin at a multiple of 64 bytes, as NumPy writes them, so that a reader may map them.
  const size_t fixed = kMagicBytes + 4;
  text.append(63 - (fixed + text.size()) % 64, ' ');
  text.push_back('\n');
  EDUBA_CHECK((fixed + text.size()) % 64 == 0 && text.size() <= 0xffff);
  std::string head(kMagic, kMagicBytes);
  head += {'\x01', '\x00', static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)};
  EDUBA_RETURN_IF_ERROR(file->Write(head + text));
  return std::unique_ptr<NpyWriter>(new NpyWriter(std::move(file), type, elements));
}

NpyWriter::NpyWriter(std::unique_ptr<AtomicFile> file, NpyType type, int64_t elements)
    : file_(std::move(file)), type_(type), missing_(elements) {}

absl::Status NpyWriter::AppendBytes(const void* data, NpyType type, int64_t count) {
  EDUBA_CHECK(type == type_);
  EDUBA_CHECK(count <= missing_);
  EDUBA_RETURN_IF_ERROR(file_->Write(data, static_cast<size_t>(count) * NpyTypeBytes(type_)));
  missing_ -= count;
  return absl::OkStatus();
}

absl::Status NpyWriter::Finish() {
  EDUBA_CHECK_EQ(missing_, 0);
  return file_->Commit();
}

absl::StatusOr<std::vector<int64_t>> ReadRowList(const std::string& path, int64_t rows) {
  EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<NpyFile> file, NpyFile::Open(path));
  EDUBA_RETURN_IF_ERROR(file->Expect({file->type()}, {-1}, "[rows]"));
  std::vector<int64_t> out;
  absl::Status status;
  switch (file->type()) {
    case NpyType::kBool:
      status = ReadRowMask(*file, rows, out);
      break;
    case NpyType::kI8:
      status = ReadRowNumbers<int8_t>(*file, rows, out);
      break;
    case NpyType::kI16:
      status = ReadRowNumbers<int16_t>(*file, rows, out);
      break;
    case NpyType::kI32:
      status = ReadRowNumbers<int32_t>(*file, rows, out);
      break;
    case NpyType::kI64:
      status = ReadRowNumbers<int64_t>(*file, rows, out);
      break;
    case NpyType::kU8:
      status = ReadRowNumbers<uint8_t>(*file, rows, out);
      break;
    case NpyType::kU16:
      status = ReadRowNumbers<uint16_t>(*file, rows, out);
      break;
    case NpyType::kU32:
      status = ReadRowNumbers<uint32_t>(*file, rows, out);
      break;
    case NpyType::kU64:
      status = ReadRowNumbers<uint64_t>(*file, rows, out);
      break;
    case NpyType::kF16:
    case NpyType::kF32:
    case NpyType::kF64:
      status =
          absl::InvalidArgumentError(absl::StrCat(path, ": found ", NpyTypeName(file->type()),
                                                  ", wanted row numbers (any integer type) or booleans"));
      break;
  }
  EDUBA_RETURN_IF_ERROR(status);
  return out;
}

}  // namespace eduba
