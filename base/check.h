#ifndef EDUBA_BASE_CHECK_H_
#define EDUBA_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"

// Our own mistakes end the process with both values; a user's mistake is an absl::Status, never a check.
namespace eduba::internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "eduba: internal error at %s:%d: %s\n", file, line, what.c_str());
  std::abort();
}
}  // namespace eduba::internal

#define EDUBA_CHECK(condition)                                                        \
  do {                                                                                \
    if (!(condition)) ::eduba::internal::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)

#define EDUBA_CHECK_EQ(a, b)                                                                     \
  do {                                                                                           \
    const auto& check_a = (a);                                                                   \
    const auto& check_b = (b);                                                                   \
    if (!(check_a == check_b)) {                                                                 \
      ::eduba::internal::CheckFailed(__FILE__, __LINE__,                                         \
                                     absl::StrCat(#a " == " #b ": ", check_a, " vs ", check_b)); \
    }                                                                                            \
  } while (false)

#endif  // EDUBA_BASE_CHECK_H_
