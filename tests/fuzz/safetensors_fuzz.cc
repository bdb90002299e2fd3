// Any bytes as a .safetensors file: refused, or tensors that tile the data and can be read to the last byte.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

#include "base/check.h"
#include "model/safetensors.h"

namespace {

// A folder of this process, with the one file in it.
const std::string& Folder() {
  static const std::string folder = [] {
    std::string name = "/tmp/safetensors_fuzz.XXXXXX";
    EDUBA_CHECK(mkdtemp(name.data()) != nullptr);
    return name;
  }();
  return folder;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = static_cast<int64_t>(size);
  const size_t start = std::min<size_t>(size, 8 + eduba::kSafetensorsHeaderBytesMax);
  const auto header = eduba::ParseSafetensorsHeader({data, start}, bytes, "input");
  const std::string path = Folder() + "/model.safetensors";
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(reinterpret_cast<const char*>(data), bytes);
  const auto opened = eduba::Safetensors::Open(Folder());
  unlink(path.c_str());
  if (!header.ok()) {
    EDUBA_CHECK(header.status().message().find('\n') == absl::string_view::npos);
    EDUBA_CHECK(!opened.ok());
    return 0;
  }
  int64_t tensor_bytes = 0;
  for (const auto& [name, tensor] : header->tensors) tensor_bytes += tensor.bytes;
  EDUBA_CHECK_EQ(header->data_offset + tensor_bytes, bytes);
  if (!opened.ok()) return 0;  // A tensor that is not aligned.
  for (const auto& [name, tensor] : (*opened)->tensors()) {
    const auto& stored = header->tensors.at(name);
    EDUBA_CHECK_EQ(tensor.bytes, stored.bytes);
    EDUBA_CHECK(
        std::equal(tensor.data, tensor.data + tensor.bytes, data + header->data_offset + stored.begin));
  }
  return 0;
}
