#ifndef EDUBA_INGEST_HDF5_FILE_H_
#define EDUBA_INGEST_HDF5_FILE_H_

#include <hdf5.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ingest/hdf5_chunks.h"

// What h5ad.cc needs of HDF5, with Status for errors. Internal to ingest/.
namespace eduba::hdf5 {

// Everything that calls HDF5 holds one: HDF5 works for one thread at a time, and prints nothing (its errors
// become Status). One thread may hold several.
class LibraryLock {
 public:
  LibraryLock();
  ~LibraryLock();
  LibraryLock(const LibraryLock&) = delete;
  LibraryLock& operator=(const LibraryLock&) = delete;

 private:
  H5E_auto2_t handler_ = nullptr;
  void* data_ = nullptr;
};

// Owns any HDF5 object. Negative: none.
class Id {
 public:
  Id() = default;
  explicit Id(hid_t id) : id_(id) {}
  Id(Id&& other) noexcept : id_(std::exchange(other.id_, -1)) {}
  Id& operator=(Id&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  ~Id() {
    if (id_ < 0) return;
    const LibraryLock lock;
    H5Idec_ref(id_);
  }

  bool ok() const { return id_ >= 0; }
  hid_t get() const { return id_; }

 private:
  hid_t id_ = -1;
};

// kInvalidArgument with `message` and what HDF5 says was the matter. Call it right after the call that
// failed.
absl::Status Error(const std::string& message);

// Whether the object at `parent`/`name` exists.
bool HasChild(hid_t parent, const std::string& name);
// Names of a group's children, or of the fields of a dataset of records, in alphabetical order. Empty on
// error.
std::vector<std::string> ChildNames(hid_t object);
// "found no WHAT in it; it has A, B, C": the end of a message about a missing child.
std::string MissingText(const std::string& what, const std::vector<std::string>& there);

// A text attribute of `object`, or "" where there is none (or it is no text).
std::string TextAttribute(hid_t object, const std::string& name);
// An attribute that holds `count` integers; kInvalidArgument when it is not there or is another.
absl::StatusOr<std::vector<int64_t>> IntegerAttribute(hid_t object, const std::string& name, int count);

// An open dataset of numbers, strings or records, of up to two axes, all of it written and readable here.
class Dataset {
 public:
  // `name` begins the error messages: "file.h5ad: obs/louvain". kInvalidArgument when it is missing or no
  // dataset, not all of it was written, its chunks are none that Chunks takes, or it has more than two
  // axes.
  static absl::StatusOr<Dataset> Open(hid_t parent, const std::string& path, const std::string& name);
  // The same for a dataset that is open already.
  static absl::StatusOr<Dataset> Adopt(Id dataset, const std::string& name);

  const std::string& name() const { return name_; }
  // Sizes of the axes. A scalar has one axis, of size 1.
  const std::vector<int64_t>& shape() const { return shape_; }
  hid_t id() const { return id_.get(); }
  hid_t type() const { return type_.get(); }
  bool is_records() const { return H5Tget_class(type_.get()) == H5T_COMPOUND; }

  // Reads the block that starts at `begin` with `count` per axis, converted to the memory type `type`. Text
  // of variable length is allocated by HDF5 (free() it, whatever the status). kInvalidArgument when a chunk
  // does not unpack to its size.
  absl::Status Read(hid_t type, const std::vector<int64_t>& begin, const std::vector<int64_t>& count,
                    void* out) const;

 private:
  Dataset() = default;

  Id id_;
  Id type_;
  Id space_;
  bool scalar_ = false;
  std::string name_;
  std::vector<int64_t> shape_;
  std::unique_ptr<Chunks> chunks_;  // Where there are chunks.
};

// One column of a table: a dataset of one axis, or one field of a dataset of records (so anndata up to 0.6
// wrote tables).
class Column {
 public:
  enum class Kind { kText, kInteger, kBoolean, kFloat, kOther };

  static absl::StatusOr<Column> Of(Dataset data);
  // `records` is shared by the columns of one table.
  static absl::StatusOr<Column> OfField(std::shared_ptr<const Dataset> records, const std::string& field);

  const std::string& name() const { return name_; }
  int64_t size() const { return data_->shape()[0]; }
  Kind kind() const { return kind_; }
  // "int32", "text", ...: for messages.
  std::string KindText() const;
  // Numbers per row: 1, or the length of an array field (rank 1) of records.
  int64_t width() const { return width_; }

  // Rows [begin, begin + count), converted. REQUIRES: the range lies in the column; the kind fits (booleans
  // are integers, too).
  absl::Status ReadIntegers(int64_t begin, int64_t count, int64_t* out) const;
  absl::Status ReadNumbers(int64_t begin, int64_t count, float* out) const;  // count * width() numbers
  absl::Status ReadNumbers(int64_t begin, int64_t count, double* out) const;
  // Text, integers and booleans ("False", "True") as text; kInvalidArgument for other kinds.
  absl::StatusOr<std::vector<std::string>> ReadText(int64_t begin, int64_t count) const;

 private:
  Column() = default;

  // Fills in kind_ and width_ from type_.
  absl::Status Classify();
  // Reads with the memory type `element` of one row.
  absl::Status Read(hid_t element, int64_t begin, int64_t count, void* out) const;

  std::shared_ptr<const Dataset> data_;
  std::string field_;  // Empty: the dataset itself.
  std::string name_;
  Id type_;  // The type of one row, as it is stored.
  Kind kind_ = Kind::kOther;
  bool is_array_ = false;
  int64_t width_ = 1;
};

}  // namespace eduba::hdf5

#endif  // EDUBA_INGEST_HDF5_FILE_H_
