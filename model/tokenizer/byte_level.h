#ifndef EDUBA_MODEL_TOKENIZER_BYTE_LEVEL_H_
#define EDUBA_MODEL_TOKENIZER_BYTE_LEVEL_H_

#include <string>

#include "absl/strings/string_view.h"

namespace eduba {

// GPT-2's alphabet: every byte is one printable character, so that a vocabulary can be written as text. The
// printable bytes of Latin-1 ('!'..'~', U+00A1..U+00AC, U+00AE..U+00FF) are themselves; the others are
// U+0100, U+0101, ... in order.

// Appends the characters of `bytes`.
void AppendByteLevel(std::string& out, absl::string_view bytes);

// The bytes that a token stands for; a token with any character outside the alphabet (an added token) stands
// for its own UTF-8. `token` is valid UTF-8.
std::string BytesOfToken(absl::string_view token);

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_BYTE_LEVEL_H_
