#ifndef EDUBA_MODEL_SESSION_DEFAULTS_H_
#define EDUBA_MODEL_SESSION_DEFAULTS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace eduba {

// How sessions of a model are meant to be, where its folder says so in streaming.json, a file of our own:
//   {"policy": "streaming", "window": 256, "positions": "rolling", "sink_tokens": 4, "sink_token_id": 0}
// Absent or null: nothing is said.
struct SessionDefaults {
  std::string policy;     // "model", "streaming", "star"; "": nothing is said.
  std::string positions;  // "absolute", "rolling", "clamped"; "": nothing is said.
  std::optional<int64_t> window;
  std::optional<int64_t> sink_tokens;
  std::optional<int32_t> sink_token_id;  // The id of the token that all sinks of a session are.
};

inline constexpr int64_t kSessionDefaultsBytesMax = int64_t{1} << 16;

// INVALID_ARGUMENT or UNIMPLEMENTED names the field, also one that is not known. `name` begins the messages.
absl::StatusOr<SessionDefaults> ParseSessionDefaults(const std::string& text, const std::string& name);
// The defaults in a model's folder; nullopt where there is no streaming.json in it.
absl::StatusOr<std::optional<SessionDefaults>> LoadSessionDefaults(const std::string& folder);

}  // namespace eduba

#endif  // EDUBA_MODEL_SESSION_DEFAULTS_H_
