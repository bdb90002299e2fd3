#include "ingest/hdf5_file.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba::hdf5 {
namespace {

constexpr size_t kNamesListedMax = 30;
// One string of fixed length; anndata's are names. A larger size is a broken file.
constexpr size_t kFixedTextBytesMax = size_t{1} << 20;
// Bytes of text asked of HDF5 at a time.
constexpr size_t kTextBlockBytes = size_t{1} << 22;

// Recursive, because closing an object takes it, too. Never destroyed: files may be closed at the very
// end.
std::recursive_mutex& LibraryMutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

// Keeps the first description, which upwards is the innermost one.
herr_t KeepFirst(unsigned index, const H5E_error2_t* error, void* out) {
  if (index == 0 && error->desc != nullptr) *static_cast<std::string*>(out) = error->desc;
  return 0;
}

herr_t AppendName(hid_t, const char* name, const H5L_info_t*, void* out) {
  static_cast<std::vector<std::string>*>(out)->emplace_back(name);
  return 0;
}

// The memory type of the dataset's or field's strings: HDF5 does not convert between its kinds of string.
struct TextType {
  bool variable = false;
  size_t bytes = 0;  // The bytes of one element in memory.
  bool space_padded = false;
};

TextType TextTypeOf(hid_t type) {
  TextType out;
  out.variable = H5Tis_variable_str(type) > 0;
  out.bytes = out.variable ? sizeof(char*) : H5Tget_size(type);
  out.space_padded = H5Tget_strpad(type) == H5T_STR_SPACEPAD;
  return out;
}

std::string FixedText(const char* begin, const TextType& type) {
  size_t size = strnlen(begin, type.bytes);
  while (type.space_padded && size > 0 && begin[size - 1] == ' ') --size;
  return std::string(begin, size);
}

// Whether every element of a dataset of this shape has its place in the file.
bool IsWholeInFile(hid_t dataset, hid_t space, const std::vector<int64_t>& shape) {
  if (std::count(shape.begin(), shape.end(), 0) > 0) return true;
  const Id plist(H5Dget_create_plist(dataset));
  if (H5Pget_layout(plist.get()) != H5D_CHUNKED) {
    H5D_space_status_t status = H5D_SPACE_STATUS_ERROR;
    return H5Dget_space_status(dataset, &status) >= 0 && status == H5D_SPACE_STATUS_ALLOCATED;
  }
  // For chunks H5Dget_space_status compares compressed bytes with uncompressed ones, so the chunks are
  // counted.
  hsize_t chunk[2] = {1, 1};
  hsize_t written = 0;
  if (H5Pget_chunk(plist.get(), static_cast<int>(shape.size()), chunk) < 0 ||
      H5Dget_num_chunks(dataset, space, &written) < 0) {
    return false;
  }
  unsigned __int128 wanted = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    wanted *= (static_cast<hsize_t>(shape[i]) + chunk[i] - 1) / chunk[i];
  }
  return written == wanted;
}

const char* ClassText(H5T_class_t type_class) {
  switch (type_class) {
    case H5T_INTEGER:
      return "integers";
    case H5T_FLOAT:
      return "floats";
    case H5T_STRING:
      return "text";
    case H5T_ENUM:
      return "booleans";
    case H5T_COMPOUND:
      return "records";
    case H5T_ARRAY:
      return "arrays";
    case H5T_REFERENCE:
      return "references";
    default:
      return "raw bytes";
  }
}

}  // namespace

LibraryLock::LibraryLock() {
  LibraryMutex().lock();
  H5Eget_auto2(H5E_DEFAULT, &handler_, &data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

LibraryLock::~LibraryLock() {
  H5Eset_auto2(H5E_DEFAULT, handler_, data_);
  LibraryMutex().unlock();
}

absl::Status Error(const std::string& message) {
  std::string reason;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, KeepFirst, &reason);
  return absl::InvalidArgumentError(reason.empty() ? message
                                                   : absl::StrCat(message, " (HDF5: ", reason, ")"));
}

bool HasChild(hid_t parent, const std::string& name) {
  return H5Lexists(parent, name.c_str(), H5P_DEFAULT) > 0 &&
         H5Oexists_by_name(parent, name.c_str(), H5P_DEFAULT) > 0;
}

std::vector<std::string> ChildNames(hid_t object) {
  std::vector<std::string> names;
  if (H5Iget_type(object) == H5I_DATASET) {
    const Id type(H5Dget_type(object));
    const int fields =
        type.ok() && H5Tget_class(type.get()) == H5T_COMPOUND ? H5Tget_nmembers(type.get()) : 0;
    for (int i = 0; i < fields; ++i) {
      char* name = H5Tget_member_name(type.get(), static_cast<unsigned>(i));
      if (name != nullptr) names.emplace_back(name);
      H5free_memory(name);
    }
    std::sort(names.begin(), names.end());
  } else {
    H5Literate(object, H5_INDEX_NAME, H5_ITER_INC, nullptr, AppendName, &names);
  }
  return names;
}

std::string MissingText(const std::string& what, const std::vector<std::string>& there) {
  if (there.empty()) return absl::StrCat("found no ", what, ": there is nothing in it");
  const std::vector<std::string> listed(
      there.begin(), there.begin() + static_cast<ptrdiff_t>(std::min(there.size(), kNamesListedMax)));
  return absl::StrCat(
      "found no ", what, "; there is ", absl::StrJoin(listed, ", "),
      there.size() > listed.size() ? absl::StrCat(" and ", there.size() - listed.size(), " more") : "");
}

std::string TextAttribute(hid_t object, const std::string& name) {
  if (H5Aexists(object, name.c_str()) <= 0) return "";
  const Id attribute(H5Aopen(object, name.c_str(), H5P_DEFAULT));
  const Id type(attribute.ok() ? H5Aget_type(attribute.get()) : -1);
  const Id space(attribute.ok() ? H5Aget_space(attribute.get()) : -1);
  if (!type.ok() || !space.ok() || H5Tget_class(type.get()) != H5T_STRING ||
      H5Sget_simple_extent_npoints(space.get()) != 1) {
    return "";
  }
  const TextType text = TextTypeOf(type.get());
  if (text.variable) {
    char* value = nullptr;
    if (H5Aread(attribute.get(), type.get(), static_cast<void*>(&value)) < 0 || value == nullptr) return "";
    std::string out = value;
    std::free(value);
    return out;
  }
  if (text.bytes > kFixedTextBytesMax) return "";
  std::vector<char> value(text.bytes);
  if (H5Aread(attribute.get(), type.get(), value.data()) < 0) return "";
  return FixedText(value.data(), text);
}

absl::StatusOr<std::vector<int64_t>> IntegerAttribute(hid_t object, const std::string& name, int count) {
  const Id attribute(H5Aexists(object, name.c_str()) > 0 ? H5Aopen(object, name.c_str(), H5P_DEFAULT) : -1);
  const Id type(attribute.ok() ? H5Aget_type(attribute.get()) : -1);
  const Id space(attribute.ok() ? H5Aget_space(attribute.get()) : -1);
  std::vector<int64_t> out(static_cast<size_t>(count));
  if (!type.ok() || !space.ok() || H5Tget_class(type.get()) != H5T_INTEGER ||
      H5Sget_simple_extent_npoints(space.get()) != count ||
      H5Aread(attribute.get(), H5T_NATIVE_INT64, out.data()) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("found no attribute '", name, "' of ", count, " integers"));
  }
  return out;
}

absl::StatusOr<Dataset> Dataset::Open(hid_t parent, const std::string& path, const std::string& name) {
  Id dataset(HasChild(parent, path) ? H5Dopen2(parent, path.c_str(), H5P_DEFAULT) : -1);
  if (!dataset.ok()) return absl::InvalidArgumentError(absl::StrCat(name, ": found no such array"));
  return Adopt(std::move(dataset), name);
}

absl::StatusOr<Dataset> Dataset::Adopt(Id dataset, const std::string& name) {
  Dataset out;
  out.name_ = name;
  out.id_ = std::move(dataset);
  out.type_ = Id(H5Dget_type(out.id_.get()));
  out.space_ = Id(H5Dget_space(out.id_.get()));
  if (!out.type_.ok() || !out.space_.ok()) {
    return Error(absl::StrCat(name, ": cannot read its type or shape"));
  }
  const H5S_class_t space_class = H5Sget_simple_extent_type(out.space_.get());
  if (space_class == H5S_NULL) return absl::InvalidArgumentError(absl::StrCat(name, ": holds nothing"));
  out.scalar_ = space_class == H5S_SCALAR;
  const int axes = out.scalar_ ? 1 : H5Sget_simple_extent_ndims(out.space_.get());
  if (axes < 1 || axes > 2) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": found ", axes, " axes, wanted 1 or 2"));
  }
  hsize_t sizes[2] = {1, 1};
  if (!out.scalar_) H5Sget_simple_extent_dims(out.space_.get(), sizes, nullptr);
  for (int i = 0; i < axes; ++i) {
    if (sizes[i] > static_cast<hsize_t>(INT64_MAX)) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": found an axis of ", sizes[i], " entries"));
    }
    out.shape_.push_back(static_cast<int64_t>(sizes[i]));
  }
  // HDF5 answers with zeros where nothing was ever written; a program that died while it wrote leaves such
  // holes.
  if (!IsWholeInFile(out.id_.get(), out.space_.get(), out.shape_)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": found only a part of its ", absl::StrJoin(out.shape_, " x "),
                     " elements in the file, wanted all; write the file again"));
  }
  const Id plist(H5Dget_create_plist(out.id_.get()));
  if (H5Pget_layout(plist.get()) == H5D_CHUNKED) {
    EDUBA_ASSIGN_OR_RETURN(out.chunks_, Chunks::Of(out.id_.get(), out.type_.get(), out.shape_, name));
  }
  return out;
}

absl::Status Dataset::Read(hid_t type, const std::vector<int64_t>& begin, const std::vector<int64_t>& count,
                           void* out) const {
  EDUBA_CHECK_EQ(begin.size(), shape_.size());
  hsize_t start[2] = {0, 0};
  hsize_t size[2] = {1, 1};
  for (size_t i = 0; i < begin.size(); ++i) {
    EDUBA_CHECK(begin[i] >= 0 && count[i] >= 0 && count[i] <= shape_[i] && begin[i] <= shape_[i] - count[i]);
    if (count[i] == 0) return absl::OkStatus();
    start[i] = static_cast<hsize_t>(begin[i]);
    size[i] = static_cast<hsize_t>(count[i]);
  }
  if (chunks_ != nullptr && chunks_->serves()) return chunks_->Read(type, begin, count, out);
  if (chunks_ != nullptr) EDUBA_RETURN_IF_ERROR(chunks_->CheckBlock(begin, count));
  herr_t done = -1;
  if (scalar_) {
    done = H5Dread(id_.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, out);
  } else {
    const Id file_space(H5Scopy(space_.get()));
    const Id memory_space(H5Screate_simple(static_cast<int>(begin.size()), size, nullptr));
    if (file_space.ok() && memory_space.ok() &&
        H5Sselect_hyperslab(file_space.get(), H5S_SELECT_SET, start, nullptr, size, nullptr) >= 0) {
      done = H5Dread(id_.get(), type, memory_space.get(), file_space.get(), H5P_DEFAULT, out);
    }
  }
  if (done >= 0) return absl::OkStatus();
  return Error(absl::StrCat(name_, ": cannot read rows ", begin[0], " to ", begin[0] + count[0]));
}

absl::StatusOr<Column> Column::Of(Dataset data) {
  Column out;
  out.name_ = data.name();
  out.type_ = Id(H5Tcopy(data.type()));
  out.data_ = std::make_shared<const Dataset>(std::move(data));
  EDUBA_RETURN_IF_ERROR(out.Classify());
  return out;
}

absl::StatusOr<Column> Column::OfField(std::shared_ptr<const Dataset> records, const std::string& field) {
  Column out;
  out.name_ = absl::StrCat(records->name(), "/", field);
  out.field_ = field;
  const int index = H5Tget_member_index(records->type(), field.c_str());
  if (index < 0) return absl::InvalidArgumentError(absl::StrCat(out.name_, ": found no such field"));
  out.type_ = Id(H5Tget_member_type(records->type(), static_cast<unsigned>(index)));
  out.data_ = std::move(records);
  EDUBA_RETURN_IF_ERROR(out.Classify());
  return out;
}

absl::Status Column::Classify() {
  if (data_->shape().size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(name_, ": found ", data_->shape().size(), " axes, wanted 1"));
  }
  if (H5Tget_class(type_.get()) == H5T_ARRAY) {
    hsize_t size = 0;
    if (H5Tget_array_ndims(type_.get()) != 1 || H5Tget_array_dims2(type_.get(), &size) < 0 ||
        size > INT32_MAX) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ": found an array of several axes per row, wanted one"));
    }
    is_array_ = true;
    width_ = static_cast<int64_t>(size);
    type_ = Id(H5Tget_super(type_.get()));
  }
  switch (H5Tget_class(type_.get())) {
    case H5T_INTEGER:
      kind_ = Kind::kInteger;
      break;
    case H5T_FLOAT:
      kind_ = Kind::kFloat;
      break;
    case H5T_STRING:
      kind_ = Kind::kText;
      break;
    case H5T_ENUM:  // h5py stores NumPy's booleans as an enumeration of one byte, FALSE = 0 and TRUE = 1.
      kind_ = H5Tget_size(type_.get()) == 1 ? Kind::kBoolean : Kind::kOther;
      break;
    default:
      kind_ = Kind::kOther;
  }
  return absl::OkStatus();
}

std::string Column::KindText() const { return ClassText(H5Tget_class(type_.get())); }

absl::Status Column::Read(hid_t element, int64_t begin, int64_t count, void* out) const {
  Id row;
  if (is_array_) {
    const auto size = static_cast<hsize_t>(width_);
    row = Id(H5Tarray_create2(element, 1, &size));
  } else {
    row = Id(H5Tcopy(element));
  }
  if (!field_.empty()) {
    // A record in memory with this field alone: HDF5 picks fields by their names.
    Id record(H5Tcreate(H5T_COMPOUND, H5Tget_size(row.get())));
    H5Tinsert(record.get(), field_.c_str(), 0, row.get());
    row = std::move(record);
  }
  return data_->Read(row.get(), {begin}, {count}, out);
}

absl::Status Column::ReadIntegers(int64_t begin, int64_t count, int64_t* out) const {
  EDUBA_CHECK(!is_array_);
  if (kind_ == Kind::kInteger) return Read(H5T_NATIVE_INT64, begin, count, out);
  EDUBA_CHECK(kind_ == Kind::kBoolean);
  std::vector<int8_t> bytes(static_cast<size_t>(count));
  EDUBA_RETURN_IF_ERROR(Read(type_.get(), begin, count, bytes.data()));
  std::copy(bytes.begin(), bytes.end(), out);
  return absl::OkStatus();
}

absl::Status Column::ReadNumbers(int64_t begin, int64_t count, float* out) const {
  EDUBA_CHECK(kind_ == Kind::kInteger || kind_ == Kind::kFloat);
  return Read(H5T_NATIVE_FLOAT, begin, count, out);
}

absl::Status Column::ReadNumbers(int64_t begin, int64_t count, double* out) const {
  EDUBA_CHECK(kind_ == Kind::kInteger || kind_ == Kind::kFloat);
  return Read(H5T_NATIVE_DOUBLE, begin, count, out);
}

absl::StatusOr<std::vector<std::string>> Column::ReadText(int64_t begin, int64_t count) const {
  std::vector<std::string> out;
  if (is_array_ || kind_ == Kind::kOther || kind_ == Kind::kFloat) {
    return absl::InvalidArgumentError(
        absl::StrCat(name_, ": found ", KindText(), ", wanted text, integers, booleans or categories"));
  }
  out.reserve(static_cast<size_t>(count));
  if (kind_ == Kind::kInteger || kind_ == Kind::kBoolean) {
    std::vector<int64_t> values(static_cast<size_t>(count));
    EDUBA_RETURN_IF_ERROR(ReadIntegers(begin, count, values.data()));
    for (const int64_t value : values) {
      out.push_back(kind_ == Kind::kInteger ? absl::StrCat(value) : value == 0 ? "False" : "True");
    }
    return out;
  }
  const TextType text = TextTypeOf(type_.get());
  if (text.bytes == 0 || text.bytes > kFixedTextBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": found text of ", text.bytes,
                                                   " bytes per row, wanted at most ", kFixedTextBytesMax));
  }
  const int64_t block = std::max<int64_t>(1, static_cast<int64_t>(kTextBlockBytes / text.bytes));
  for (int64_t at = begin; at < begin + count; at += block) {
    const int64_t rows = std::min(block, begin + count - at);
    if (text.variable) {
      std::vector<char*> values(static_cast<size_t>(rows), nullptr);
      const absl::Status status = Read(type_.get(), at, rows, values.data());
      for (char* value : values) {
        out.emplace_back(value == nullptr ? "" : value);
        std::free(value);
      }
      EDUBA_RETURN_IF_ERROR(status);
    } else {
      std::vector<char> values(static_cast<size_t>(rows) * text.bytes);
      EDUBA_RETURN_IF_ERROR(Read(type_.get(), at, rows, values.data()));
      for (int64_t i = 0; i < rows; ++i) {
        out.push_back(FixedText(&values[static_cast<size_t>(i) * text.bytes], text));
      }
    }
  }
  return out;
}

}  // namespace eduba::hdf5
