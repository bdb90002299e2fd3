#include "model/tokenizer/normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/stringpiece.h>
#include <unicode/uniset.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"

namespace eduba {

using nlohmann::json;

namespace {

absl::StatusOr<std::string> ReplaceAll(absl::string_view text, absl::string_view what,
                                       absl::string_view content) {
  std::string out;
  while (true) {
    const size_t at = text.find(what);
    absl::StrAppend(&out, text.substr(0, at));
    if (at == absl::string_view::npos) return out;
    absl::StrAppend(&out, content);
    text.remove_prefix(at + what.size());
    if (static_cast<int64_t>(out.size()) > kNormalizedBytesMax) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the tokenizer's normalizer makes the text longer than ", kNormalizedBytesMax,
                       " bytes; encode it in parts"));
    }
  }
}

}  // namespace

std::string Nfc(absl::string_view text) {
  static const icu::FilteredNormalizer2* const normalizer = [] {
    UErrorCode error = U_ZERO_ERROR;
    const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(error);
    auto* known = new icu::UnicodeSet(icu::UnicodeString(u"[:age=9.0:]"), error);
    EDUBA_CHECK(U_SUCCESS(error) != 0);
    known->freeze();
    return new icu::FilteredNormalizer2(*nfc, *known);
  }();
  std::string out;
  icu::StringByteSink<std::string> sink(&out);
  UErrorCode error = U_ZERO_ERROR;
  normalizer->normalizeUTF8(0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink,
                            nullptr, error);
  EDUBA_CHECK(U_SUCCESS(error) != 0);
  return out;
}

absl::StatusOr<Normalizer> Normalizer::Parse(const json& component, const std::string& name) {
  Normalizer normalizer;
  EDUBA_RETURN_IF_ERROR(normalizer.Add(component, name, 0));
  return normalizer;
}

absl::Status Normalizer::Add(const json& component, const std::string& name, int depth) {
  constexpr int kDepthMax = 4;
  constexpr size_t kStepsMax = 16;
  if (component.is_null()) return absl::OkStatus();
  if (!component.is_object() || depth > kDepthMax || steps_.size() == kStepsMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", JsonText(component), ", wanted an object"));
  }
  const std::string type =
      component.value("type", json()).is_string() ? component["type"].get<std::string>() : "";
  JsonFields fields(component, name, type);
  fields.Ignore({"type"});
  if (type == "Sequence") {
    const json& parts = fields.Get("normalizers");
    if (!parts.is_array()) fields.Invalid("normalizers", "a list");
    for (const json& part : parts) {
      if (fields.ok()) fields.Fail(Add(part, name, depth + 1));
    }
  } else if (type == "NFC") {
    steps_.push_back({Step::Kind::kNfc, "", ""});
  } else if (type == "Prepend") {
    steps_.push_back({Step::Kind::kPrepend, "", fields.Text("prepend", "")});
  } else if (type == "Replace") {
    const json& pattern = fields.Get("pattern");
    const std::string content = fields.Text("content", "");
    if (!pattern.is_object() || pattern.size() != 1 || !pattern.contains("String") ||
        !pattern["String"].is_string() || pattern["String"].get_ref<const std::string&>().empty()) {
      fields.Refuse("pattern", "only a fixed text, {\"String\": ...}, is replaced");
    } else {
      steps_.push_back({Step::Kind::kReplace, pattern["String"].get<std::string>(), content});
    }
  } else {
    return absl::UnimplementedError(
        absl::StrCat(name, " of type ", JsonText(component.value("type", json())),
                     " is not supported; known are NFC, Prepend, Replace and Sequence"));
  }
  return fields.Finish();
}

absl::StatusOr<std::string> Normalizer::Normalize(absl::string_view text) const {
  std::string out(text);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Step::Kind::kNfc:
        out = Nfc(out);
        break;
      case Step::Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.content);
        break;
      case Step::Kind::kReplace: {
        EDUBA_ASSIGN_OR_RETURN(out, ReplaceAll(out, step.what, step.content));
        break;
      }
    }
  }
  return out;
}

}  // namespace eduba
