#include "model/tokenizer/decoder.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/tokenizer/byte_level.h"

namespace eduba {
namespace {

using nlohmann::json;

constexpr const char* kKnown = "; known are ByteLevel and Sequence [Replace ..., ByteFallback, Fuse, Strip]";

std::string TypeOf(const json& component) {
  if (!component.is_object()) return "";
  const auto type = component.find("type");
  return type != component.end() && type->is_string() ? type->get<std::string>() : "";
}

// "<0x41>".
std::optional<char> ByteOfToken(absl::string_view token) {
  if (token.size() != 6 || !absl::StartsWith(token, "<0x") || token[5] != '>') return std::nullopt;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) return std::nullopt;
    value = value * 16 + (absl::ascii_isdigit(static_cast<unsigned char>(c))
                              ? c - '0'
                              : absl::ascii_tolower(static_cast<unsigned char>(c)) - 'a' + 10);
  }
  return static_cast<char>(value);
}

absl::Status ParseStep(const json& component, const std::string& name, int& stage, Decoder& decoder) {
  // Stages in which the steps of a sequence come.
  enum { kReplace, kByteFallback, kFuse, kStrip, kEnd };
  const std::string type = TypeOf(component);
  const auto at = [&](int wanted, int next) {
    if (stage > wanted) {
      return absl::UnimplementedError(
          absl::StrCat(name, ": ", type, " is not supported at this place", kKnown));
    }
    stage = next;
    return absl::OkStatus();
  };
  JsonFields fields(component, name, type);
  fields.Ignore({"type"});
  if (type == "Replace") {
    EDUBA_RETURN_IF_ERROR(at(kReplace, kReplace));
    const json& pattern = fields.Get("pattern");
    const std::string content = fields.Text("content", "");
    if (!pattern.is_object() || pattern.size() != 1 || !pattern.contains("String") ||
        !pattern["String"].is_string() || pattern["String"].get_ref<const std::string&>().empty()) {
      fields.Refuse("pattern", "only a fixed text, {\"String\": ...}, is replaced");
    } else {
      decoder.replace.emplace_back(pattern["String"].get<std::string>(), content);
    }
  } else if (type == "ByteFallback") {
    EDUBA_RETURN_IF_ERROR(at(kByteFallback, kFuse));
    decoder.byte_fallback = true;
  } else if (type == "Fuse") {
    EDUBA_RETURN_IF_ERROR(at(kFuse, kStrip));
  } else if (type == "Strip") {
    if (stage < kStrip) {
      return absl::UnimplementedError(absl::StrCat(name, ": Strip without Fuse before it", kKnown));
    }
    EDUBA_RETURN_IF_ERROR(at(kStrip, kEnd));
    decoder.strip = fields.Text("content", "");
    if (decoder.strip.empty() ||
        static_cast<size_t>(FirstUtf8(decoder.strip).bytes) != decoder.strip.size()) {
      fields.Invalid("content", "one character");
    }
    decoder.strip_count = static_cast<int>(fields.Number("start", 0, 0, 1000));
    fields.RefuseUnlessOff({"stop"});
  } else {
    return absl::UnimplementedError(absl::StrCat(
        name, " of type ", JsonText(component.is_object() ? component.value("type", json()) : component),
        " is not supported", kKnown));
  }
  return fields.Finish();
}

}  // namespace

absl::StatusOr<Decoder> Decoder::Parse(const json& component, const std::string& name) {
  constexpr size_t kStepsMax = 16;
  Decoder decoder;
  const std::string type = TypeOf(component);
  if (type == "ByteLevel") {
    JsonFields fields(component, name, type);
    // These have no effect in a decoder.
    fields.Ignore({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    EDUBA_RETURN_IF_ERROR(fields.Finish());
    decoder.byte_level = true;
    return decoder;
  }
  if (type != "Sequence") {
    return absl::UnimplementedError(absl::StrCat(
        name, " of type ", JsonText(component.is_object() ? component.value("type", json()) : component),
        " is not supported", kKnown));
  }
  JsonFields fields(component, name, type);
  fields.Ignore({"type"});
  const json& steps = fields.Get("decoders");
  if (!steps.is_array() || steps.size() > kStepsMax) fields.Invalid("decoders", "a short list");
  EDUBA_RETURN_IF_ERROR(fields.Finish());
  if (steps.size() == 1 && TypeOf(steps[0]) == "ByteLevel") return Parse(steps[0], name);
  int stage = 0;
  for (const json& step : steps) EDUBA_RETURN_IF_ERROR(ParseStep(step, name, stage, decoder));
  return decoder;
}

std::string DecoderStream::Push(absl::string_view token) {
  if (decoder_.byte_level) return assembler_.Push(BytesOfToken(token));
  std::string text(token);
  for (const auto& [what, content] : decoder_.replace) text = absl::StrReplaceAll(text, {{what, content}});
  if (decoder_.byte_fallback) {
    if (const std::optional<char> byte = ByteOfToken(text); byte.has_value()) {
      bytes_.push_back(*byte);
      return "";
    }
  }
  return Strip(EndBytes() + text);
}

std::string DecoderStream::Finish() {
  if (decoder_.byte_level) return assembler_.Finish();
  return Strip(EndBytes());
}

std::string DecoderStream::EndBytes() {
  std::string text = std::move(bytes_);
  bytes_.clear();
  // A run that is no UTF-8 as a whole is one replacement character a byte, valid parts of it too: tokenizers
  // does so.
  if (CheckUtf8(text).ok()) return text;
  std::string replaced;
  for (size_t i = 0; i < text.size(); ++i) absl::StrAppend(&replaced, kReplacementCharacter);
  return replaced;
}

std::string DecoderStream::Strip(absl::string_view rest) {
  while (strip_left_ > 0 && !rest.empty()) {
    if (!absl::ConsumePrefix(&rest, decoder_.strip)) {
      strip_left_ = 0;
    } else {
      --strip_left_;
    }
  }
  return std::string(rest);
}

}  // namespace eduba
