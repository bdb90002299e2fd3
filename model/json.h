#ifndef EDUBA_MODEL_JSON_H_
#define EDUBA_MODEL_JSON_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace eduba {

struct JsonLimits {
  int64_t bytes_max = int64_t{1} << 20;
  int depth_max = 16;  // How deep arrays and objects may lie in one another.
};

// The JSON that `text` is, strictly: valid UTF-8, every key once in its object (readers that let the first or
// the last win disagree about what a file says). kInvalidArgument otherwise, or over a limit; `name` begins
// the message.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, const JsonLimits& limits,
                                         const std::string& name);

// A value as an error message shows it: one line, at most 60 characters.
std::string JsonText(const nlohmann::json& value);

}  // namespace eduba

#endif  // EDUBA_MODEL_JSON_H_
