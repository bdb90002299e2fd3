#include "model/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/tokenizer/byte_level.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

using nlohmann::json;

// What ByteLevel splits by unless use_regex is false.
constexpr absl::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Part {
  int64_t begin = 0;
  int64_t end = 0;
  bool match = false;
};

// The whole text as matches and what lies between them.
std::vector<Part> PartsOf(int64_t size, const std::vector<Regex::Match>& matches) {
  std::vector<Part> parts;
  int64_t at = 0;
  for (const Regex::Match& match : matches) {
    if (match.begin > at) parts.push_back({at, match.begin, false});
    parts.push_back({match.begin, match.end, true});
    at = match.end;
  }
  if (at < size) parts.push_back({at, size, false});
  return parts;
}

std::vector<Regex::Match> FindText(absl::string_view text, absl::string_view what) {
  std::vector<Regex::Match> matches;
  for (size_t at = text.find(what); at != absl::string_view::npos; at = text.find(what, at + what.size())) {
    matches.push_back({static_cast<int64_t>(at), static_cast<int64_t>(at + what.size())});
  }
  return matches;
}

// A match joins the part before it, unless that is a match that has joined already.
std::vector<Part> MergeWithPrevious(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  bool joined = false;
  for (const Part& part : parts) {
    const bool joins = part.match && !joined && !merged.empty();
    if (joins) {
      merged.back().end = part.end;
    } else {
      merged.push_back(part);
    }
    joined = part.match;
  }
  return merged;
}

// The same, seen from the end.
std::vector<Part> MergeWithNext(std::vector<Part> parts) {
  std::vector<Part> merged;
  bool joined = false;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    const bool joins = part->match && !joined && !merged.empty();
    if (joins) {
      merged.back().begin = part->begin;
    } else {
      merged.push_back(*part);
    }
    joined = part->match;
  }
  std::reverse(merged.begin(), merged.end());
  return merged;
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const json& component, const std::string& name) {
  PreTokenizer pre_tokenizer;
  EDUBA_RETURN_IF_ERROR(pre_tokenizer.Add(component, name, 0));
  return pre_tokenizer;
}

absl::Status PreTokenizer::Add(const json& component, const std::string& name, int depth) {
  constexpr int kDepthMax = 4;
  constexpr size_t kStepsMax = 16;
  if (component.is_null()) return absl::OkStatus();
  if (!component.is_object() || depth > kDepthMax || steps_.size() == kStepsMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", JsonText(component), ", wanted an object"));
  }
  if (!steps_.empty() && steps_.back().byte_level) {
    return absl::UnimplementedError(absl::StrCat(name, ": ByteLevel is supported as the last step only"));
  }
  const std::string type =
      component.value("type", json()).is_string() ? component["type"].get<std::string>() : "";
  JsonFields fields(component, name, type);
  fields.Ignore({"type"});
  Step step;
  if (type == "Sequence") {
    const json& parts = fields.Get("pretokenizers");
    if (!parts.is_array()) fields.Invalid("pretokenizers", "a list");
    for (const json& part : parts) {
      if (fields.ok()) fields.Fail(Add(part, name, depth + 1));
    }
    return fields.Finish();
  }
  if (type == "ByteLevel") {
    step.byte_level = true;
    step.space_first = fields.Flag("add_prefix_space", true);
    fields.Ignore({"trim_offsets"});  // Offsets into the text are not given.
    if (fields.Flag("use_regex", true)) {
      EDUBA_ASSIGN_OR_RETURN(step.split, Regex::Compile(kGpt2Pattern));
    }
  } else if (type == "Split") {
    const json& pattern = fields.Get("pattern");
    const bool one = pattern.is_object() && pattern.size() == 1 && pattern.begin()->is_string();
    if (one && pattern.contains("Regex")) {
      auto regex = Regex::Compile(pattern["Regex"].get<std::string>());
      if (!regex.ok()) return Annotate(regex.status(), name);
      step.split = *std::move(regex);
    } else if (one && pattern.contains("String") &&
               !pattern["String"].get_ref<const std::string&>().empty()) {
      step.split_at = pattern["String"].get<std::string>();
    } else {
      fields.Invalid("pattern", "{\"Regex\": ...} or {\"String\": ...}");
    }
    const std::string behavior = fields.Text("behavior", "");
    if (behavior == "MergedWithPrevious") {
      step.behavior = Behavior::kMergedWithPrevious;
    } else if (behavior == "MergedWithNext") {
      step.behavior = Behavior::kMergedWithNext;
    } else if (behavior != "Isolated") {
      fields.Refuse("behavior", "known are Isolated, MergedWithPrevious and MergedWithNext");
    }
    fields.RefuseUnlessOff({"invert"});
  } else if (type == "Metaspace") {
    step.metaspace = true;
    step.replacement = fields.Text("replacement", "");
    if (step.replacement.empty() ||
        static_cast<size_t>(FirstUtf8(step.replacement).bytes) != step.replacement.size()) {
      fields.Invalid("replacement", "one character");
    }
    const std::string prepend =
        fields.Text("prepend_scheme", fields.Flag("add_prefix_space", true) ? "always" : "never");
    if (prepend == "always" || prepend == "first") {
      step.prepend = prepend == "always" ? Prepend::kAlways : Prepend::kFirst;
    } else if (prepend != "never") {
      fields.Refuse("prepend_scheme", "known are always, first and never");
    }
    fields.Ignore({"str_rep"});  // The replacement again, in old files.
    if (fields.Flag("split", true)) {
      step.split_at = step.replacement;
      step.behavior = Behavior::kMergedWithNext;
    }
  } else {
    return absl::UnimplementedError(
        absl::StrCat(name, " of type ", JsonText(component.value("type", json())),
                     " is not supported; known are ByteLevel, Split, Metaspace and Sequence"));
  }
  EDUBA_RETURN_IF_ERROR(fields.Finish());
  steps_.push_back(std::move(step));
  return absl::OkStatus();
}

absl::Status PreTokenizer::Run(absl::string_view text, bool at_start,
                               absl::FunctionRef<void(absl::string_view)> word) const {
  return RunFrom(0, text, at_start, word);
}

absl::Status PreTokenizer::RunFrom(size_t step_index, absl::string_view text, bool at_start,
                                   absl::FunctionRef<void(absl::string_view)> word) const {
  if (text.empty()) return absl::OkStatus();
  if (step_index == steps_.size()) {
    word(text);
    return absl::OkStatus();
  }
  const Step& step = steps_[step_index];

  std::string changed;
  if (step.space_first && text[0] != ' ') {
    changed = absl::StrCat(" ", text);
    text = changed;
  }
  if (step.metaspace) {
    changed = absl::StrReplaceAll(text, {{" ", step.replacement}});
    const bool prepends = step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && at_start);
    if (prepends && !absl::StartsWith(changed, step.replacement)) changed.insert(0, step.replacement);
    text = changed;
  }

  std::vector<Part> parts;
  const auto size = static_cast<int64_t>(text.size());
  if (step.split.has_value()) {
    EDUBA_ASSIGN_OR_RETURN(const std::vector<Regex::Match> matches, step.split->FindAll(text));
    parts = PartsOf(size, matches);
  } else if (!step.split_at.empty()) {
    parts = PartsOf(size, FindText(text, step.split_at));
  } else {
    parts = {{0, size, false}};
  }
  if (step.behavior == Behavior::kMergedWithPrevious) parts = MergeWithPrevious(parts);
  if (step.behavior == Behavior::kMergedWithNext) parts = MergeWithNext(std::move(parts));

  std::string mapped;
  for (const Part& part : parts) {
    absl::string_view piece = text.substr(part.begin, part.end - part.begin);
    if (step.byte_level) {
      mapped.clear();
      AppendByteLevel(mapped, piece);
      piece = mapped;
    }
    EDUBA_RETURN_IF_ERROR(RunFrom(step_index + 1, piece, at_start && part.begin == 0, word));
  }
  return absl::OkStatus();
}

}  // namespace eduba
