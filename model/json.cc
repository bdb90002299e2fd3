#include "model/json.h"

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

using nlohmann::json;

// Builds the value as the parser walks, so that depth and repeated keys are refused before they cost
// anything.
class Builder : public nlohmann::json_sax<json> {
 public:
  explicit Builder(int depth_max) : depth_max_(depth_max) {}

  json& root() { return root_; }
  const std::string& error() const { return error_; }

  bool null() override { return Put(json()); }
  bool boolean(bool value) override { return Put(json(value)); }
  bool number_integer(number_integer_t value) override { return Put(json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return Put(json(value)); }
  bool number_float(number_float_t value, const string_t&) override { return Put(json(value)); }
  bool string(string_t& value) override { return Put(json(std::move(value))); }
  bool binary(binary_t&) override { return Fail("binary data"); }  // JSON text has none.

  bool start_object(std::size_t) override { return Open(json::object()); }
  bool start_array(std::size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& key) override {
    const auto [place, fresh] = open_.back()->get_ref<json::object_t&>().emplace(key, json());
    if (!fresh) return Fail(absl::StrCat("the key ", JsonText(json(key)), " appears twice in one object"));
    slot_ = &place->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("syntax error at byte ", position));
  }

 private:
  bool Fail(std::string what) {
    error_ = std::move(what);
    return false;
  }
  // Where the next value goes: the whole, the key just read, or the end of the array.
  json* Place(json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_object()) {
      *slot_ = std::move(value);
      return slot_;
    }
    auto& array = open_.back()->get_ref<json::array_t&>();
    array.push_back(std::move(value));
    return &array.back();
  }
  bool Put(json value) {
    Place(std::move(value));
    return true;
  }
  bool Open(json value) {
    if (static_cast<int>(open_.size()) == depth_max_) {
      return Fail(absl::StrCat("nested deeper than ", depth_max_));
    }
    open_.push_back(Place(std::move(value)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const int depth_max_;
  json root_;
  json* slot_ = nullptr;
  // Pointers stay valid: only the innermost array grows, and its elements are closed by then.
  std::vector<json*> open_;
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseJson(absl::string_view text, const JsonLimits& limits, const std::string& name) {
  if (static_cast<int64_t>(text.size()) > limits.bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", text.size(), " bytes of JSON, at most ", limits.bytes_max, " are read"));
  }
  Builder builder(limits.depth_max);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": not the JSON that is wanted: ", builder.error(), "; is the file whole?"));
  }
  return std::move(builder.root());
}

std::string JsonText(const json& value) {
  constexpr size_t kCharactersMax = 60;
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kCharactersMax) text = absl::StrCat(text.substr(0, kCharactersMax - 3), "...");
  return text;
}

}  // namespace eduba
