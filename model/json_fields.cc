#include "model/json_fields.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "model/json.h"

namespace eduba {

using nlohmann::json;

const json& JsonFields::Get(const std::string& field) {
  static const json kNull;
  read_.insert(field);
  const auto found = object_.find(field);
  return found == object_.end() ? kNull : *found;
}

int64_t JsonFields::Size(const std::string& field, std::optional<int64_t> fallback, int64_t max) {
  const json& value = Get(field);
  if (value.is_null()) {
    if (!fallback.has_value()) Invalid(field, "a whole number");
    return fallback.value_or(1);
  }
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number >= 1 && number <= static_cast<uint64_t>(max)) return static_cast<int64_t>(number);
  }
  Invalid(field, absl::StrCat("a whole number from 1 to ", max));
  return fallback.value_or(1);
}

std::optional<double> JsonFields::OptionalNumber(const std::string& field, double min, double max) {
  const json& value = Get(field);
  if (value.is_null()) return std::nullopt;
  if (value.is_number()) {
    const auto number = value.get<double>();
    if (std::isfinite(number) && number >= min && number <= max) return number;
  }
  Invalid(field, absl::StrCat("a number from ", min, " to ", max));
  return std::nullopt;
}

double JsonFields::Number(const std::string& field, std::optional<double> fallback, double min, double max) {
  const std::optional<double> number = OptionalNumber(field, min, max);
  if (number.has_value()) return *number;
  if (!fallback.has_value()) Invalid(field, "a number");
  return fallback.value_or(1);
}

bool JsonFields::Flag(const std::string& field, bool fallback) {
  const json& value = Get(field);
  if (value.is_null()) return fallback;
  if (value.is_boolean()) return value.get<bool>();
  Invalid(field, "true or false");
  return fallback;
}

std::string JsonFields::Text(const std::string& field, const std::string& fallback) {
  const json& value = Get(field);
  if (value.is_null()) return fallback;
  if (value.is_string()) return value.get<std::string>();
  Invalid(field, "a text");
  return fallback;
}

void JsonFields::Ignore(std::initializer_list<const char*> fields) {
  for (const char* field : fields) read_.insert(field);
}

void JsonFields::RefuseUnlessOff(std::initializer_list<const char*> fields) {
  for (const char* field : fields) {
    const json& value = Get(field);
    const bool off = value.is_null() || (value.is_boolean() && !value.get<bool>()) ||
                     (value.is_number() && value.get<double>() == 0) ||
                     (value.is_string() && value.get_ref<const std::string&>().empty()) ||
                     (value.is_structured() && value.empty());
    if (!off) Refuse(field, "it would change the result");
  }
}

void JsonFields::MustEqual(const std::string& field, double value, const std::string& spelling) {
  const json& other = Get(field);
  if (other.is_null() || (other.is_number() && other.get<double>() == value)) return;
  Invalid(field, absl::StrCat("the same as ", spelling, ", ", value));
}

void JsonFields::Fail(const absl::Status& status) { status_.Update(status); }

void JsonFields::Refuse(const std::string& field, const std::string& why) {
  Fail(absl::UnimplementedError(absl::StrCat(name_, ": ", field, " = ", JsonText(Get(field)),
                                             " is not implemented for ", what_, ": ", why)));
}

void JsonFields::Invalid(const std::string& field, const std::string& want) {
  Fail(absl::InvalidArgumentError(
      absl::StrCat(name_, ": ", field, " = ", JsonText(Get(field)), ", wanted ", want)));
}

absl::Status JsonFields::Finish() {
  for (const auto& [field, value] : object_.items()) {
    if (!ok()) break;
    if (read_.count(field) > 0) continue;
    Fail(absl::UnimplementedError(absl::StrCat(name_, ": field ", JsonText(json(field)), " = ",
                                               JsonText(value), " is not known for ", what_,
                                               " and may change the result; remove it if it does not")));
  }
  return status_;
}

}  // namespace eduba
