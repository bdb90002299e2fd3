#ifndef EDUBA_INGEST_TESTING_H5AD_BUILDER_H_
#define EDUBA_INGEST_TESTING_H5AD_BUILDER_H_

#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace eduba {

// A folder of this process, removed at its end.
struct TempFolder {
  TempFolder() { std::filesystem::create_directories(path); }
  ~TempFolder() { std::filesystem::remove_all(path); }
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / absl::StrCat("eduba_ingest_test_", getpid());
};

inline std::string TempPath(const std::string& name) {
  static const TempFolder folder;
  return folder.path / name;
}

enum class Text { kVariable, kFixed };

// Writes an HDF5 file piece by piece, as the versions of anndata do.
class H5adBuilder {
 public:
  explicit H5adBuilder(const std::string& name) : path_(TempPath(name)) {
    file_ = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    EXPECT_GE(file_, 0);
  }
  // The finished file.
  std::string Done() {
    EXPECT_GE(H5Fclose(file_), 0);
    return path_;
  }
  hid_t file() const { return file_; }

  void Group(const std::string& path) {
    H5Gclose(H5Gcreate2(file_, path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  }

  template <typename T>
  void Numbers(const std::string& path, const std::vector<hsize_t>& shape, hid_t stored,
               const std::vector<T>& data, hid_t plist = H5P_DEFAULT) {
    const hid_t memory = std::is_same_v<T, float>     ? H5T_NATIVE_FLOAT
                         : std::is_same_v<T, double>  ? H5T_NATIVE_DOUBLE
                         : std::is_same_v<T, int64_t> ? H5T_NATIVE_INT64
                                                      : H5T_NATIVE_INT8;
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t set = H5Dcreate2(file_, path.c_str(), stored, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    EXPECT_GE(H5Dwrite(set, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data.data()), 0);
    H5Dclose(set);
    H5Sclose(space);
  }

  // Writes booleans as h5py stores NumPy's.
  void Booleans(const std::string& path, const std::vector<int8_t>& data) {
    const hid_t type = H5Tenum_create(H5T_STD_I8LE);
    int8_t value = 0;
    H5Tenum_insert(type, "FALSE", &value);
    value = 1;
    H5Tenum_insert(type, "TRUE", &value);
    const hsize_t size = data.size();
    const hid_t space = H5Screate_simple(1, &size, nullptr);
    const hid_t set = H5Dcreate2(file_, path.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    EXPECT_GE(H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data.data()), 0);
    H5Dclose(set);
    H5Sclose(space);
    H5Tclose(type);
  }

  void Texts(const std::string& path, const std::vector<std::string>& data, Text kind = Text::kVariable,
             bool scalar = false) {
    const hid_t type = TextType(kind);
    const hsize_t size = data.size();
    const hid_t space = scalar ? H5Screate(H5S_SCALAR) : H5Screate_simple(1, &size, nullptr);
    const hid_t set = H5Dcreate2(file_, path.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    const std::vector<char> bytes = TextBytes(data, kind);
    EXPECT_GE(H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()), 0);
    H5Dclose(set);
    H5Sclose(space);
    H5Tclose(type);
  }

  void TextAttribute(const std::string& path, const std::string& name, const std::string& value) {
    const hid_t object = H5Oopen(file_, path.c_str(), H5P_DEFAULT);
    const hid_t type = TextType(Text::kVariable);
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(object, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT);
    const char* text = value.c_str();
    EXPECT_GE(H5Awrite(attribute, type, static_cast<const void*>(&text)), 0);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
    H5Oclose(object);
  }

  void IntegerAttribute(const std::string& path, const std::string& name,
                        const std::vector<int64_t>& values) {
    const hid_t object = H5Oopen(file_, path.c_str(), H5P_DEFAULT);
    const hsize_t size = values.size();
    const hid_t space = H5Screate_simple(1, &size, nullptr);
    const hid_t attribute = H5Acreate2(object, name.c_str(), H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    EXPECT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, values.data()), 0);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Oclose(object);
  }

  // Writes, as anndata 0.7 does, an attribute of `path` that refers to `target`.
  void ReferenceAttribute(const std::string& path, const std::string& name, const std::string& target) {
    const hid_t object = H5Oopen(file_, path.c_str(), H5P_DEFAULT);
    hobj_ref_t reference = 0;
    EXPECT_GE(H5Rcreate(&reference, file_, target.c_str(), H5R_OBJECT, -1), 0);
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute =
        H5Acreate2(object, name.c_str(), H5T_STD_REF_OBJ, space, H5P_DEFAULT, H5P_DEFAULT);
    EXPECT_GE(H5Awrite(attribute, H5T_STD_REF_OBJ, &reference), 0);
    H5Aclose(attribute);
    H5Sclose(space);
    H5Oclose(object);
  }

  // The table of cells as anndata from 0.7 on writes it.
  void Cells(const std::vector<std::string>& names, Text kind = Text::kVariable) {
    Group("obs");
    Texts("obs/barcode", names, kind);
    TextAttribute("obs", "_index", "barcode");
  }

 private:
  static constexpr size_t kFixedBytes = 8;

  static hid_t TextType(Text kind) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, kind == Text::kVariable ? H5T_VARIABLE : kFixedBytes);
    H5Tset_cset(type, kind == Text::kVariable ? H5T_CSET_UTF8 : H5T_CSET_ASCII);
    H5Tset_strpad(type, kind == Text::kVariable ? H5T_STR_NULLTERM : H5T_STR_NULLPAD);
    return type;
  }

  static std::vector<char> TextBytes(const std::vector<std::string>& data, Text kind) {
    const size_t each = kind == Text::kVariable ? sizeof(const char*) : kFixedBytes;
    std::vector<char> out(data.size() * each, '\0');
    for (size_t i = 0; i < data.size(); ++i) {
      const char* text = data[i].c_str();
      if (kind == Text::kVariable) {
        std::memcpy(&out[i * each], static_cast<const void*>(&text), each);
      } else {
        std::memcpy(&out[i * each], text, std::min(each, data[i].size()));
      }
    }
    return out;
  }

  std::string path_;
  hid_t file_ = -1;
};

}  // namespace eduba

#endif  // EDUBA_INGEST_TESTING_H5AD_BUILDER_H_
