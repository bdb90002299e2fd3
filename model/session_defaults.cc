#include "model/session_defaults.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/read_file.h"

namespace eduba {
namespace {

constexpr int64_t kTokensMax = int64_t{1} << 30;

std::string OneOf(JsonFields& fields, const std::string& field, std::initializer_list<const char*> known) {
  std::string text = fields.Text(field, "");
  if (!text.empty() && std::find(known.begin(), known.end(), text) == known.end()) {
    fields.Invalid(field, absl::StrJoin(known, " or "));
  }
  return text;
}

// A whole number from 0 on, which JsonFields::Size does not take for one.
std::optional<int64_t> Count(JsonFields& fields, const std::string& field, int64_t max) {
  const nlohmann::json& value = fields.Get(field);
  if (value.is_null()) return std::nullopt;
  if (value.is_number_integer() && value >= 0 && value <= max) return value.get<int64_t>();
  fields.Invalid(field, absl::StrCat("a whole number, 0 to ", max));
  return std::nullopt;
}

}  // namespace

absl::StatusOr<SessionDefaults> ParseSessionDefaults(const std::string& text, const std::string& name) {
  EDUBA_ASSIGN_OR_RETURN(const nlohmann::json object,
                         ParseJson(text, {.bytes_max = kSessionDefaultsBytesMax}, name));
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": found ", JsonText(object), ", wanted an object"));
  }
  JsonFields fields(object, name, "session defaults");
  SessionDefaults defaults;
  defaults.policy = OneOf(fields, "policy", {"model", "streaming", "star"});
  defaults.positions = OneOf(fields, "positions", {"absolute", "rolling", "clamped"});
  defaults.window = Count(fields, "window", kTokensMax);
  defaults.sink_tokens = Count(fields, "sink_tokens", kTokensMax);
  const auto id = Count(fields, "sink_token_id", std::numeric_limits<int32_t>::max());
  if (id) defaults.sink_token_id = static_cast<int32_t>(*id);
  EDUBA_RETURN_IF_ERROR(fields.Finish());
  return defaults;
}

absl::StatusOr<std::optional<SessionDefaults>> LoadSessionDefaults(const std::string& folder) {
  const std::string path = folder + "/streaming.json";
  const absl::StatusOr<std::string> text = ReadWholeFile(path, kSessionDefaultsBytesMax);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  if (!text.ok()) return text.status();
  EDUBA_ASSIGN_OR_RETURN(const SessionDefaults defaults, ParseSessionDefaults(*text, path));
  return defaults;
}

}  // namespace eduba
