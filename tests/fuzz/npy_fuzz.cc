// Any bytes as an .npy file: they are refused, or they are read whole and written again to the same array.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "ingest/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using eduba::NpyFile;
  const auto header = eduba::ParseNpyHeader({data, std::min<size_t>(size, eduba::kNpyHeaderBytesMax)},
                                            static_cast<int64_t>(size), "input");
  const int fd = memfd_create("npy_fuzz", MFD_CLOEXEC);
  EDUBA_CHECK(fd >= 0 && write(fd, data, size) == static_cast<ssize_t>(size));
  const std::string path = absl::StrCat("/proc/self/fd/", fd);
  const auto file = NpyFile::Open(path);
  EDUBA_CHECK_EQ(file.ok(), header.ok());
  if (file.ok()) {
    const auto bytes = static_cast<int64_t>(eduba::NpyTypeBytes((*file)->type()));
    EDUBA_CHECK_EQ(header->data_offset + header->elements * bytes, static_cast<int64_t>(size));
    std::vector<uint8_t> elements(static_cast<size_t>((*file)->elements() * bytes));
    EDUBA_CHECK((*file)->Read(0, (*file)->elements(), elements.data()).ok());
    EDUBA_CHECK(elements.empty() || std::equal(elements.begin(), elements.end(), data + header->data_offset));
    const auto rows = eduba::ReadRowList(path, /*rows=*/10);
    if (rows.ok()) {
      for (const int64_t row : *rows) EDUBA_CHECK(row >= 0 && row < 10);
    }
  }
  close(fd);
  return 0;
}
