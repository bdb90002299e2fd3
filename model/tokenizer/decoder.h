#ifndef EDUBA_MODEL_TOKENIZER_DECODER_H_
#define EDUBA_MODEL_TOKENIZER_DECODER_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/tokenizer/utf8.h"

namespace eduba {

// The "decoder" of a tokenizer.json: ByteLevel, or a Sequence of Replace (of fixed texts), ByteFallback, Fuse
// and Strip (of one character, at the start), in this order, as Llama's and Gemma's files have it.
struct Decoder {
  static absl::StatusOr<Decoder> Parse(const nlohmann::json& component, const std::string& name);

  bool byte_level = false;
  std::vector<std::pair<std::string, std::string>> replace;
  bool byte_fallback = false;
  std::string strip;  // The character; at most strip_count of it at the start of the text.
  int strip_count = 0;
};

// Tokens in, text out, piece by piece: the pieces joined are what tokenizers makes of all tokens.
class DecoderStream {
 public:
  explicit DecoderStream(const Decoder& decoder) : decoder_(decoder), strip_left_(decoder.strip_count) {}

  std::string Push(absl::string_view token);
  std::string Finish();

 private:
  // The run of byte tokens that has ended.
  std::string EndBytes();
  // Text that is final: all but what Strip takes.
  std::string Strip(absl::string_view rest);

  const Decoder& decoder_;
  int strip_left_;
  Utf8Assembler assembler_{Utf8Assembler::Invalid::kMaximalSubpart};  // Used by ByteLevel.
  std::string bytes_;  // A run of byte tokens: only its end tells whether it is text.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_DECODER_H_
