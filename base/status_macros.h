#ifndef EDUBA_BASE_STATUS_MACROS_H_
#define EDUBA_BASE_STATUS_MACROS_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

// Returns from the enclosing function when `expr` is not OK.
#define EDUBA_RETURN_IF_ERROR(expr)              \
  do {                                           \
    absl::Status eduba_status = (expr);          \
    if (!eduba_status.ok()) return eduba_status; \
  } while (false)

#define EDUBA_CONCAT_INNER(a, b) a##b
#define EDUBA_CONCAT(a, b) EDUBA_CONCAT_INNER(a, b)

// EDUBA_ASSIGN_OR_RETURN(auto x, F());
#define EDUBA_ASSIGN_OR_RETURN(lhs, expr) \
  EDUBA_ASSIGN_OR_RETURN_IMPL(EDUBA_CONCAT(eduba_statusor_, __LINE__), lhs, expr)
#define EDUBA_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                \
  if (!tmp.ok()) return std::move(tmp).status();    \
  lhs = std::move(tmp).value()

namespace eduba {

// The same code, with "context: " before the message. OK stays OK.
inline absl::Status Annotate(const absl::Status& status, const std::string& context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", std::string(status.message())));
}

}  // namespace eduba

#endif  // EDUBA_BASE_STATUS_MACROS_H_
