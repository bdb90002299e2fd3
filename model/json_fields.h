#ifndef EDUBA_MODEL_JSON_FIELDS_H_
#define EDUBA_MODEL_JSON_FIELDS_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace eduba {

// Reads the fields of one JSON object and remembers which were asked for, so that Finish() can refuse the
// others: a field that nobody asked for may change the result. The first error sticks and the reads after it
// return defaults, so that a parser is a plain list of reads with one check at its end.
class JsonFields {
 public:
  // `object` must outlive this. `name` begins the messages, `what` it describes ("gemma2", "ByteLevel")
  // appears in refusals.
  JsonFields(const nlohmann::json& object, std::string name, std::string what)
      : object_(object), name_(std::move(name)), what_(std::move(what)) {}

  const std::string& name() const { return name_; }
  const std::string& what() const { return what_; }

  // The field, absent and null alike being null. Counts as read.
  const nlohmann::json& Get(const std::string& field);
  // Whether it is there, be it null. Does not count as read.
  bool Has(const std::string& field) const { return object_.contains(field); }

  // A whole number in [1, max]; `fallback` where the field is absent, or null (which python writes for "not
  // set").
  int64_t Size(const std::string& field, std::optional<int64_t> fallback, int64_t max);
  // A finite number in [min, max].
  double Number(const std::string& field, std::optional<double> fallback,
                double min = std::numeric_limits<double>::lowest(),
                double max = std::numeric_limits<double>::max());
  // Reads a number as Number does; nullopt where it is absent or null.
  std::optional<double> OptionalNumber(const std::string& field, double min, double max);
  bool Flag(const std::string& field, bool fallback);
  std::string Text(const std::string& field, const std::string& fallback);

  // These fields change no logit, whatever they say.
  void Ignore(std::initializer_list<const char*> fields);
  // These would change the result: allowed only where they switch nothing on (absent, null, false, 0, "", [],
  // {}).
  void RefuseUnlessOff(std::initializer_list<const char*> fields);
  // Another spelling of something that is known: allowed only where it says the same (or is absent or null).
  void MustEqual(const std::string& field, double value, const std::string& spelling);

  void Fail(const absl::Status& status);
  void Refuse(const std::string& field, const std::string& why);    // kUnimplemented
  void Invalid(const std::string& field, const std::string& want);  // kInvalidArgument
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }  // The first error.

  // The first error; kUnimplemented naming a field that was neither read nor ignored; else OK.
  absl::Status Finish();

 private:
  const nlohmann::json& object_;
  const std::string name_;
  const std::string what_;
  std::set<std::string> read_;
  absl::Status status_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_JSON_FIELDS_H_
