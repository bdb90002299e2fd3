#ifndef EDUBA_MODEL_TESTING_SAFETENSORS_WRITER_H_
#define EDUBA_MODEL_TESTING_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"

namespace eduba::testing {

// A tensor of a file to be written.
struct TensorToWrite {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

// The bytes of a file with this header text, padded with spaces to `align` as the format's own writer does
// (1: not).
inline std::string SafetensorsBytes(std::string header, const std::string& data, size_t align = 8) {
  while ((8 + header.size()) % align != 0) header.push_back(' ');
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + data;
}

inline nlohmann::json SafetensorsHeaderJson(const std::vector<TensorToWrite>& tensors) {
  nlohmann::json header = nlohmann::json::object();
  size_t at = 0;
  for (const TensorToWrite& tensor : tensors) {
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {at, at + tensor.bytes.size()}}};
    at += tensor.bytes.size();
  }
  return header;
}

inline std::string SafetensorsBytes(const std::vector<TensorToWrite>& tensors, size_t align = 8) {
  std::string data;
  for (const TensorToWrite& tensor : tensors) data += tensor.bytes;
  return SafetensorsBytes(SafetensorsHeaderJson(tensors).dump(), data, align);
}

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << bytes;
  EDUBA_CHECK(file.good());
}

}  // namespace eduba::testing

#endif  // EDUBA_MODEL_TESTING_SAFETENSORS_WRITER_H_
