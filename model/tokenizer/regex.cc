#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/tokenizer/regex.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/tokenizer/unicode_additions.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

constexpr size_t kPatternBytesMax = 4096;
// Unicode's White_Space, which is Oniguruma's \s. PCRE2's own has U+180E besides.
constexpr absl::string_view kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

class Translator {
 public:
  explicit Translator(absl::string_view pattern) : rest_(pattern) {}

  absl::StatusOr<std::string> Run() {
    while (!rest_.empty() && status_.ok()) {
      switch (rest_[0]) {
        case '\\':
          Escape();
          break;
        case '[':
          Class();
          break;
        case '(':
          Group();
          break;
        case ')':
        case '|':
          absl::StrAppend(&out_, Take(1));
          break;
        case '*':
        case '+':
        case '?':
          absl::StrAppend(&out_, Take(1));
          // Lazy and possessive are the same in both; after them comes no third.
          if (absl::StartsWith(rest_, "?") || absl::StartsWith(rest_, "+")) absl::StrAppend(&out_, Take(1));
          break;
        case '{':
          Repeat();
          break;
        case '.':
        case '^':
        case '$':
          Refuse(Take(1));
          break;
        default:
          absl::StrAppend(&out_, Literal(TakeCharacter()));
      }
    }
    if (!status_.ok()) return status_;
    return out_;
  }

 private:
  absl::string_view Take(size_t bytes) {
    const absl::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(taken.size());
    return taken;
  }
  absl::string_view TakeCharacter() { return Take(static_cast<size_t>(FirstUtf8(rest_).bytes)); }
  void Refuse(absl::string_view construct) {
    std::string shown;  // An error is one line, whatever stands in the expression.
    for (const char c : construct) {
      shown += absl::ascii_iscntrl(static_cast<unsigned char>(c))
                   ? absl::StrCat("\\x", absl::Hex(c, absl::kZeroPad2))
                   : std::string(1, c);
    }
    status_.Update(absl::UnimplementedError(
        absl::StrCat("regular expression with \"", shown, "\", which is not supported")));
  }
  static std::string Literal(absl::string_view character) {
    return absl::StrCat("\\x{", absl::Hex(static_cast<uint32_t>(CodePoint(character))), "}");
  }

  // Takes the name in \p{name}, from after the p.
  absl::string_view TakeCategory() {
    const size_t close = rest_.find('}');
    if (!absl::StartsWith(rest_, "{") || close == absl::string_view::npos) {
      Refuse("\\p");
      return "";
    }
    const absl::string_view name = rest_.substr(1, close - 1);
    rest_.remove_prefix(close + 1);
    return name;
  }
  // The inside of a class: the category as PCRE2 knows it and what newer versions of Unicode added to it.
  std::string Category(absl::string_view name) {
    const auto* found = std::find_if(std::begin(kUnicodeAdditions), std::end(kUnicodeAdditions),
                                     [&](const UnicodeAdditions& entry) { return name == entry.category; });
    if (found == std::end(kUnicodeAdditions)) {
      Refuse(absl::StrCat("\\p{", name, "}"));
      return "";
    }
    return absl::StrCat("\\p{", name, "}", found->ranges);
  }

  // An escape that stands for one character: the character, written for PCRE2. Empty: `letter` is another
  // escape.
  static std::string EscapedCharacter(absl::string_view letter) {
    if (letter == "r") return "\\x{d}";
    if (letter == "n") return "\\x{a}";
    if (letter == "t") return "\\x{9}";
    if (letter == "f") return "\\x{c}";
    if (letter == "v") return "\\x{b}";
    if (letter.size() == 1 && absl::ascii_ispunct(static_cast<unsigned char>(letter[0]))) {
      return Literal(letter);
    }
    return "";
  }

  // Whether `item`, which is written into a class, is one character.
  static bool IsOneCharacter(absl::string_view item) {
    return absl::StartsWith(item, "\\x") && item.find("\\x", 2) == absl::string_view::npos;
  }

  void Escape() {
    Take(1);
    if (rest_.empty()) return Refuse("\\");
    const absl::string_view letter = TakeCharacter();
    if (letter == "s") {
      absl::StrAppend(&out_, "[", kWhiteSpace, "]");
    } else if (letter == "S") {
      absl::StrAppend(&out_, "[^", kWhiteSpace, "]");
    } else if (letter == "d") {
      absl::StrAppend(&out_, "[", Category("Nd"), "]");
    } else if (letter == "p" || letter == "P") {
      absl::StrAppend(&out_, letter == "p" ? "[" : "[^", Category(TakeCategory()), "]");
    } else if (const std::string character = EscapedCharacter(letter); !character.empty()) {
      absl::StrAppend(&out_, character);
    } else {
      Refuse(absl::StrCat("\\", letter));
    }
  }

  void Class() {
    Take(1);
    out_.push_back('[');
    if (absl::StartsWith(rest_, "^")) absl::StrAppend(&out_, Take(1));
    bool empty = true;
    bool range_may_follow = false;  // True after a single character.
    while (status_.ok()) {
      if (rest_.empty()) return Refuse("[");
      if (rest_[0] == ']') {
        if (empty) return Refuse("[]");
        break;
      }
      empty = false;
      if (absl::StartsWith(rest_, "&&")) return Refuse("&&");
      if (rest_[0] == '[') return Refuse("[ in a class");
      if (rest_[0] == '-' && range_may_follow && !absl::StartsWith(rest_, "-]")) {
        Take(1);
        out_.push_back('-');
        if (rest_.empty() || rest_[0] == '[' || rest_[0] == '-') return Refuse("a range in a class");
        const std::string last = rest_[0] == '\\' ? EscapedInClass() : Literal(TakeCharacter());
        if (status_.ok() && !IsOneCharacter(last)) return Refuse("a range in a class");
        absl::StrAppend(&out_, last);
        range_may_follow = false;
        continue;
      }
      if (rest_[0] == '\\') {
        const std::string item = EscapedInClass();
        range_may_follow = IsOneCharacter(item);
        absl::StrAppend(&out_, item);
      } else {
        absl::StrAppend(&out_, Literal(TakeCharacter()));
        range_may_follow = true;
      }
    }
    if (!status_.ok()) return;
    absl::StrAppend(&out_, Take(1));
  }

  std::string EscapedInClass() {
    Take(1);
    if (rest_.empty()) {
      Refuse("\\");
      return "";
    }
    const absl::string_view letter = TakeCharacter();
    if (letter == "s") return std::string(kWhiteSpace);
    if (letter == "d") return Category("Nd");
    if (letter == "p") return Category(TakeCategory());
    std::string character = EscapedCharacter(letter);
    if (character.empty()) Refuse(absl::StrCat("\\", letter, " in a class"));
    return character;
  }

  void Group() {
    Take(1);
    if (!absl::StartsWith(rest_, "?")) {
      out_ += "(?:";  // Nobody looks at captures.
      return;
    }
    for (const absl::string_view kind : {"?:", "?i:", "?=", "?!"}) {
      if (!absl::StartsWith(rest_, kind)) continue;
      absl::StrAppend(&out_, "(", Take(kind.size()));
      return;
    }
    Refuse(absl::StrCat("(", rest_.substr(0, 2)));
  }

  void Repeat() {
    const size_t close = rest_.find('}');
    const absl::string_view inside = close == absl::string_view::npos ? "" : rest_.substr(1, close - 1);
    const bool digits_first = !inside.empty() && absl::ascii_isdigit(static_cast<unsigned char>(inside[0]));
    const bool well_formed = digits_first && std::count(inside.begin(), inside.end(), ',') <= 1 &&
                             std::all_of(inside.begin(), inside.end(),
                                         [](unsigned char c) { return c == ',' || absl::ascii_isdigit(c); });
    if (!well_formed) return Refuse("{");
    absl::StrAppend(&out_, Take(close + 1));
    // Lazy or possessive in the one, something else in the other.
    if (absl::StartsWith(rest_, "?") || absl::StartsWith(rest_, "+")) {
      Refuse(absl::StrCat("}", rest_.substr(0, 1)));
    }
  }

  absl::string_view rest_;
  std::string out_;
  absl::Status status_;
};

std::string ErrorText(int code) {
  std::array<PCRE2_UCHAR, 160> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

struct Regex::Compiled {
  ~Compiled() { pcre2_code_free(code); }
  pcre2_code* code = nullptr;
};

absl::StatusOr<std::string> TranslatePattern(absl::string_view pattern) {
  if (pattern.size() > kPatternBytesMax) {
    return absl::UnimplementedError(
        absl::StrCat("regular expression of ", pattern.size(), " bytes, at most ", kPatternBytesMax));
  }
  EDUBA_RETURN_IF_ERROR(CheckUtf8(pattern));
  return Translator(pattern).Run();
}

absl::StatusOr<Regex> Regex::Compile(absl::string_view pattern) {
  EDUBA_ASSIGN_OR_RETURN(const std::string translated, TranslatePattern(pattern));
  int error = 0;
  PCRE2_SIZE where = 0;
  auto compiled = std::make_shared<Compiled>();
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &where, nullptr);
  if (compiled->code == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("no regular expression: ", ErrorText(error)));
  }
  uint32_t matches_empty = 0;
  pcre2_pattern_info(compiled->code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) return absl::InvalidArgumentError("regular expression that matches the empty text");
  // Without the compiler (an allocator that forbids executable memory) the interpreter runs.
  pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);
  return Regex(std::move(compiled));
}

absl::StatusOr<std::vector<Regex::Match>> Regex::FindAll(absl::string_view text) const {
  // Steps of one match: a few for each byte of the longest run of white space there may be; the rest is for
  // patterns made to be slow.
  const int64_t steps_max = std::min<int64_t>(10'000'000 + 8 * static_cast<int64_t>(text.size()), UINT32_MAX);
  constexpr uint32_t kHeapKibMax = 512 * 1024;
  const auto limits = std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)>(
      pcre2_match_context_create(nullptr), pcre2_match_context_free);
  pcre2_set_match_limit(limits.get(), static_cast<uint32_t>(steps_max));
  pcre2_set_heap_limit(limits.get(), kHeapKibMax);
  const auto data = std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)>(
      pcre2_match_data_create(1, nullptr), pcre2_match_data_free);

  std::vector<Match> matches;
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t at = 0;
  while (at < text.size()) {
    int found =
        pcre2_match(compiled_->code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), limits.get());
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
      found = pcre2_match(compiled_->code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                          data.get(), limits.get());
    }
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      return absl::ResourceExhaustedError(absl::StrCat("the tokenizer's regular expression failed at byte ",
                                                       at, " of the text: ", ErrorText(found)));
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
    matches.push_back({static_cast<int64_t>(bounds[0]), static_cast<int64_t>(bounds[1])});
    at = bounds[1];
  }
  return matches;
}

}  // namespace eduba
