#ifndef EDUBA_MODEL_TOKENIZER_REGEX_H_
#define EDUBA_MODEL_TOKENIZER_REGEX_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace eduba {

// A regular expression of a tokenizer.json, which means what Oniguruma's Ruby syntax says (the engine of
// Hugging Face's tokenizers), run by PCRE2. Only what both understand in the same way is let through:
// literals, escapes, classes, \s \S \d, \p{L} and other general categories, groups (?: (?i: (?= (?!,
// alternatives, and the quantifiers * + ? {n} {n,} {n,m}, for * + ? also lazy and possessive. White space and
// categories are those of Unicode 16, as in tokenizers 0.23, whatever PCRE2's own tables know.
class Regex {
 public:
  // kUnimplemented names a construct that is not let through; kInvalidArgument: no regular expression, or one
  // that matches the empty text (which splits nothing).
  static absl::StatusOr<Regex> Compile(absl::string_view pattern);

  struct Match {
    int64_t begin = 0;
    int64_t end = 0;
  };
  // All matches from left to right. `text` must be valid UTF-8. kResourceExhausted when a hostile pattern
  // would take for ever.
  absl::StatusOr<std::vector<Match>> FindAll(absl::string_view text) const;

 private:
  struct Compiled;
  explicit Regex(std::shared_ptr<const Compiled> compiled) : compiled_(std::move(compiled)) {}
  std::shared_ptr<const Compiled> compiled_;
};

// The pattern that PCRE2 is given. For tests.
absl::StatusOr<std::string> TranslatePattern(absl::string_view pattern);

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_REGEX_H_
