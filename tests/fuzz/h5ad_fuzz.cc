// Any structure in an .h5ad file: the input decides which of the objects that anndata knows are there, of
// which type and shape, with which attributes and content. They are refused, or they are read and what comes
// out is in its range.
//
// The file is written by HDF5 itself (and sometimes cut off): this looks for mistakes in ingest/, not in how
// HDF5 decodes its own format, which has its own fuzzers.
#include <fuzzer/FuzzedDataProvider.h>
#include <hdf5.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "ingest/h5ad.h"

namespace {

constexpr int kAxisMax = 6;
// Most axes have this size, so that arrays fit together often enough to be read.
constexpr int kCells = 3;
// Cells of which a matrix is read.
constexpr int64_t kRowsRead = 4;

class Builder {
 public:
  Builder(FuzzedDataProvider& input, const std::string& path) : input_(input) {
    file_ = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    EDUBA_CHECK(file_ >= 0);
  }
  ~Builder() { H5Fclose(file_); }

  // Nothing, a group, or an array, at `path`. True when it is a group.
  bool Object(const std::string& path) {
    switch (input_.ConsumeIntegralInRange(0, 3)) {
      case 0:
        return false;
      case 1: {
        const hid_t group = H5Gcreate2(file_, path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
        if (group < 0) return false;
        Attributes(group);
        H5Gclose(group);
        return true;
      }
      default:
        Array(path);
        return false;
    }
  }

  // A sparse matrix that is right but for its numbers, which chance alone would hardly put together.
  void Sparse(const std::string& path) {
    const hid_t group = H5Gcreate2(file_, path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    if (group < 0) return;
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, H5T_VARIABLE);
    const char* format = input_.ConsumeBool() ? "csr_matrix" : "csc_matrix";
    WriteAttribute(group, "encoding-type", type, H5Screate(H5S_SCALAR), static_cast<const void*>(&format));
    const int64_t shape[2] = {kCells, Axis()};
    const hsize_t axes = 2;
    WriteAttribute(group, "shape", H5Tcopy(H5T_NATIVE_INT64), H5Screate_simple(1, &axes, nullptr), shape);
    H5Gclose(group);
    const auto stored = input_.ConsumeIntegralInRange<hsize_t>(0, kAxisMax);
    for (const char* part : {"data", "indices", "indptr"}) {
      const bool starts = std::string(part) == "indptr";
      const hsize_t size = starts ? (format[2] == 'r' ? kCells : static_cast<hsize_t>(shape[1])) + 1 : stored;
      std::vector<int64_t> values(size);
      for (int64_t& value : values) value = input_.ConsumeIntegralInRange<int64_t>(-1, kAxisMax);
      if (starts && input_.ConsumeBool()) std::sort(values.begin(), values.end());
      const hid_t space = H5Screate_simple(1, &size, nullptr);
      const hid_t array = H5Dcreate2(file_, absl::StrCat(path, "/", part).c_str(), H5T_STD_I32LE, space,
                                     H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
      H5Dwrite(array, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
      H5Dclose(array);
      H5Sclose(space);
    }
  }

 private:
  int64_t Axis() {
    switch (input_.ConsumeIntegralInRange(0, 7)) {
      case 0:
        return input_.ConsumeIntegralInRange<int64_t>(0, kAxisMax);
      case 1:
        return kCells + 1;
      default:
        return kCells;
    }
  }

  // A type, and whether its elements are pointers to text.
  struct Type {
    hid_t id = -1;
    bool text = false;
  };

  Type ScalarType() {
    switch (input_.ConsumeIntegralInRange(0, 11)) {
      case 0:
        return {H5Tcopy(H5T_STD_I8LE)};
      case 1:
        return {H5Tcopy(H5T_STD_I16BE)};
      case 2:
        return {H5Tcopy(H5T_STD_I32LE)};
      case 3:
        return {H5Tcopy(H5T_STD_I64LE)};
      case 4:
        return {H5Tcopy(H5T_STD_U64LE)};
      case 5:
        return {H5Tcopy(H5T_IEEE_F32LE)};
      case 6:
        return {H5Tcopy(H5T_IEEE_F64BE)};
      case 7: {  // A boolean, as h5py stores it.
        const hid_t type = H5Tenum_create(H5T_STD_I8LE);
        int8_t value = 0;
        H5Tenum_insert(type, "FALSE", &value);
        value = 1;
        H5Tenum_insert(type, "TRUE", &value);
        return {type};
      }
      case 8: {
        const hid_t type = H5Tcopy(H5T_C_S1);
        H5Tset_size(type, H5T_VARIABLE);
        return {type, true};
      }
      case 9: {
        const hid_t type = H5Tcopy(H5T_C_S1);
        H5Tset_size(type, input_.ConsumeIntegralInRange<size_t>(1, 9));
        H5Tset_strpad(type, input_.PickValueInArray({H5T_STR_NULLTERM, H5T_STR_NULLPAD, H5T_STR_SPACEPAD}));
        return {type};
      }
      case 10:
        return {H5Tcreate(H5T_OPAQUE, 3)};
      default:
        return {H5Tcopy(H5T_STD_REF_OBJ)};
    }
  }

  // A scalar, or a record of the fields that tables have.
  Type ElementType() {
    if (input_.ConsumeIntegralInRange(0, 3) != 0) return ScalarType();
    std::vector<std::pair<std::string, hid_t>> fields;
    size_t bytes = 0;
    for (const char* name : {"index", "kind", "X_pca"}) {
      if (!input_.ConsumeBool()) continue;
      Type scalar = ScalarType();
      if (scalar.text) {  // Pointers inside records are more than this generator's memory can own.
        H5Tclose(scalar.id);
        scalar.id = H5Tcopy(H5T_STD_I8LE);
      }
      if (input_.ConsumeBool()) {
        const hsize_t sizes[2] = {input_.ConsumeIntegralInRange<hsize_t>(1, kAxisMax), 2};
        const hid_t array = H5Tarray_create2(scalar.id, input_.ConsumeIntegralInRange(1U, 2U), sizes);
        H5Tclose(scalar.id);
        scalar.id = array;
      }
      fields.emplace_back(name, scalar.id);
      bytes += H5Tget_size(scalar.id);
    }
    if (fields.empty()) return ScalarType();
    const hid_t record = H5Tcreate(H5T_COMPOUND, bytes);
    size_t offset = 0;
    for (const auto& [name, id] : fields) {
      H5Tinsert(record, name.c_str(), offset, id);
      offset += H5Tget_size(id);
      H5Tclose(id);
    }
    return {record};
  }

  // Content for `elements` elements, mostly small numbers. `texts` owns what pointers point to.
  std::vector<uint8_t> Content(const Type& type, hsize_t elements, std::vector<std::string>& texts) {
    const size_t bytes = H5Tget_size(type.id) * elements;
    std::vector<uint8_t> out = input_.ConsumeBytes<uint8_t>(bytes);
    out.resize(bytes, 0);
    if (!type.text) return out;
    for (hsize_t i = 0; i < elements; ++i) texts.push_back(input_.ConsumeRandomLengthString(9));
    for (hsize_t i = 0; i < elements; ++i) reinterpret_cast<const char**>(out.data())[i] = texts[i].c_str();
    return out;
  }

  hid_t Space(hsize_t& elements) {
    hsize_t sizes[3] = {1, 1, 1};
    const int axes = input_.PickValueInArray({0, 1, 1, 1, 2, 2, 3});
    elements = 1;
    for (int i = 0; i < axes; ++i) {
      sizes[i] = static_cast<hsize_t>(Axis());
      elements *= sizes[i];
    }
    return axes == 0 ? H5Screate(input_.ConsumeBool() ? H5S_SCALAR : H5S_NULL)
                     : H5Screate_simple(axes, sizes, nullptr);
  }

  void Array(const std::string& path) {
    const Type type = ElementType();
    hsize_t elements = 0;
    const hid_t space = Space(elements);
    const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
    if (input_.ConsumeBool()) {
      const hsize_t chunk[3] = {2, 3, 1};
      const int axes = H5Sget_simple_extent_ndims(space);
      if (axes > 0) H5Pset_chunk(plist, axes, chunk);
      if (input_.ConsumeBool()) H5Pset_deflate(plist, 1);
    }
    const hid_t array = H5Dcreate2(file_, path.c_str(), type.id, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    if (array >= 0) {
      if (input_.ConsumeIntegralInRange(0, 7) != 0) {
        std::vector<std::string> texts;
        const std::vector<uint8_t> content = Content(type, elements, texts);
        H5Dwrite(array, type.id, H5S_ALL, H5S_ALL, H5P_DEFAULT, content.data());
      }
      Attributes(array);
      H5Dclose(array);
    }
    H5Pclose(plist);
    H5Sclose(space);
    H5Tclose(type.id);
  }

  void Attributes(hid_t object) {
    for (const char* name : {"_index", "encoding-type", "h5sparse_format"}) {
      if (!input_.ConsumeBool()) continue;
      const hid_t type = H5Tcopy(H5T_C_S1);
      H5Tset_size(type, H5T_VARIABLE);
      const std::string text = input_.ConsumeBool()
                                   ? input_.ConsumeRandomLengthString(9)
                                   : input_.PickValueInArray<const char*>(
                                         {"csr_matrix", "csc_matrix", "csr", "csc", "_index", "kind"});
      const char* pointer = text.c_str();
      WriteAttribute(object, name, type, H5Screate(H5S_SCALAR), static_cast<const void*>(&pointer));
    }
    for (const char* name : {"shape", "h5sparse_shape"}) {
      if (!input_.ConsumeBool()) continue;
      int64_t shape[3] = {};
      const hsize_t size = input_.ConsumeIntegralInRange(0, 7) == 0 ? 3 : 2;
      for (int64_t& axis : shape) {
        axis = input_.ConsumeIntegralInRange(0, 7) == 0 ? input_.ConsumeIntegral<int64_t>() : Axis();
      }
      WriteAttribute(object, name, H5Tcopy(H5T_NATIVE_INT64), H5Screate_simple(1, &size, nullptr), shape);
    }
    if (input_.ConsumeBool()) {
      hobj_ref_t reference = input_.ConsumeIntegral<hobj_ref_t>();
      if (input_.ConsumeBool()) H5Rcreate(&reference, file_, "obs/__categories", H5R_OBJECT, -1);
      WriteAttribute(object, "categories", H5Tcopy(H5T_STD_REF_OBJ), H5Screate(H5S_SCALAR), &reference);
    }
  }

  // Takes `type` and `space`.
  void WriteAttribute(hid_t object, const char* name, hid_t type, hid_t space, const void* value) {
    const hid_t attribute = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
  }

  FuzzedDataProvider& input_;
  hid_t file_ = -1;
};

void ReadAll(const std::string& path) {
  const auto file = eduba::H5adFile::Open(path);
  if (!file.ok()) return;
  const int64_t cells = (*file)->cells();
  // An array of which every element is in the file is as small as the generator's axes.
  EDUBA_CHECK(cells >= 0 && cells <= kAxisMax);
  std::vector<int64_t> all(static_cast<size_t>(cells));
  std::iota(all.begin(), all.end(), int64_t{0});
  const auto names = (*file)->ReadCellNames(all);
  if (names.ok()) EDUBA_CHECK_EQ(static_cast<int64_t>(names->size()), cells);
  for (const char* column : {"obs/kind", "obs/index", "obs/X_pca", "obs/_index"}) {
    const auto labels = (*file)->ReadLabels(column);
    if (!labels.ok()) continue;
    EDUBA_CHECK_EQ(static_cast<int64_t>(labels->codes.size()), cells);
    for (const int32_t code : labels->codes) {
      EDUBA_CHECK(code >= -1 && code < static_cast<int32_t>(labels->names.size()));
    }
  }
  for (const char* key : {"X", "layers/counts", "obsm/X_pca", "obsm/kind"}) {
    const auto matrix = (*file)->OpenMatrix(key);
    if (!matrix.ok()) continue;
    EDUBA_CHECK_EQ((*matrix)->rows(), cells);
    const int64_t count = std::min(cells, kRowsRead);
    std::vector<float> rows(static_cast<size_t>(count * (*matrix)->cols()));
    if ((*matrix)->ReadRows(cells - count, count, rows.data()).ok()) {
      for (const float value : rows) EDUBA_CHECK(std::isfinite(value));
    }
    std::vector<int64_t> list;
    for (int64_t i = count - 1; i >= 0; --i) list.push_back(i);
    static_cast<void>((*matrix)->ReadRowList(list, rows.data()));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  FuzzedDataProvider input(data, size);
  const std::string path = std::filesystem::temp_directory_path() / absl::StrCat("h5ad_fuzz_", getpid());
  const bool cut = input.ConsumeIntegralInRange(0, 15) == 15;
  {
    Builder build(input, path);
    if (build.Object("obs")) {
      build.Object("obs/_index");
      build.Object("obs/__categories");
      if (build.Object("obs/kind")) {
        for (const char* part : {"codes", "categories", "values", "mask"})
          build.Object(absl::StrCat("obs/kind/", part));
      }
    }
    if (build.Object("uns")) build.Object("uns/kind_categories");
    if (build.Object("obsm")) build.Object("obsm/X_pca");
    if (input.ConsumeBool()) {
      build.Sparse("X");
    } else if (build.Object("X")) {
      for (const char* part : {"data", "indices", "indptr"}) build.Object(absl::StrCat("X/", part));
    }
    if (build.Object("layers")) build.Object("layers/counts");
  }
  if (cut) std::filesystem::resize_file(path, input.ConsumeIntegralInRange<uintmax_t>(0, 4096));
  ReadAll(path);
  std::filesystem::remove(path);
  return 0;
}
