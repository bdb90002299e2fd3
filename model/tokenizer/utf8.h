#ifndef EDUBA_MODEL_TOKENIZER_UTF8_H_
#define EDUBA_MODEL_TOKENIZER_UTF8_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace eduba {

// U+FFFD, which stands for bytes that are no UTF-8.
inline constexpr absl::string_view kReplacementCharacter = "\xEF\xBF\xBD";

// What a text begins with. An invalid prefix is as long as a replacement character covers by the Unicode
// standard's practice (a maximal subpart), which is what Rust, Python and browsers do.
struct Utf8Prefix {
  int bytes = 0;       // >= 1
  bool valid = false;  // A whole, valid character.
  bool cut = false;    // Not valid only because the text ends: more bytes could make it a character.
};
// REQUIRES: `text` is not empty.
Utf8Prefix FirstUtf8(absl::string_view text);

// The code point of a valid character.
char32_t CodePoint(absl::string_view character);
// Appends the character. REQUIRES: `code` is a Unicode scalar value.
void AppendUtf8(std::string& text, char32_t code);

// kInvalidArgument, with the position, when `text` is no UTF-8.
absl::Status CheckUtf8(absl::string_view text);

// Takes bytes as they come and gives text back as soon as it is known: never a part of a character, never
// invalid UTF-8. Bytes that are none become replacement characters, the same ones however the bytes were cut
// into pieces.
class Utf8Assembler {
 public:
  // How many of the bytes that are no character become one replacement character.
  enum class Invalid { kMaximalSubpart, kByte };
  explicit Utf8Assembler(Invalid invalid) : invalid_(invalid) {}

  // The text that `bytes` complete.
  std::string Push(absl::string_view bytes);
  // A character that was begun and will not be completed is replaced.
  std::string Finish();

 private:
  const Invalid invalid_;
  std::string begun_;  // At most three bytes.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_UTF8_H_
