#include "base/wire_array.h"

#include <limits>
#include <string>

#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

std::string Wanted(int64_t number_bytes, int64_t count_min, int64_t count_max) {
  if (count_min == count_max) return absl::StrCat(count_min, " numbers of ", number_bytes);
  std::string wanted = absl::StrCat("a multiple of ", number_bytes);
  if (count_min > 0) absl::StrAppend(&wanted, " from ", count_min * number_bytes);
  if (count_max <= std::numeric_limits<int64_t>::max() / number_bytes) {
    absl::StrAppend(&wanted, count_min > 0 ? " to " : " up to ", count_max * number_bytes);
  }
  return wanted;
}

}  // namespace

absl::Status CheckNumberBytes(absl::string_view what, int64_t bytes, int64_t number_bytes, int64_t count_min,
                              int64_t count_max) {
  const int64_t count = bytes / number_bytes;
  if (bytes % number_bytes == 0 && count >= count_min && count <= count_max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " have ", bytes, " bytes, wanted ", Wanted(number_bytes, count_min, count_max)));
}

}  // namespace eduba
