#ifndef EDUBA_MODEL_TOKENIZER_TOKENIZER_H_
#define EDUBA_MODEL_TOKENIZER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace eduba {

// Text of one Encode call, in bytes: its tokens are worked out in memory, at some 100 bytes a character at
// worst.
inline constexpr int64_t kEncodeBytesMax = int64_t{256} << 20;

// Token ids in, text out, as generation brings them: every piece is valid UTF-8 and ends at a character's
// end, and the pieces joined are what Decode makes of all ids at once.
class TextStream {
 public:
  virtual ~TextStream() = default;
  // The text that this token completes; often empty, sometimes that of earlier tokens. An id that is no token
  // (a model's vocabulary may be padded) has no text.
  virtual std::string Push(int32_t id) = 0;
  // What is left at the end: a character that was cut off becomes U+FFFD. Call it once.
  virtual std::string Finish() = 0;
};

// Text to token ids and back, exactly as the library that trained the tokenizer does it. Const methods may be
// called from many threads at once.
class Tokenizer {
 public:
  struct EncodeOptions {
    // Puts in what the tokenizer's own template says, for example a <bos> in front. Not what the text itself
    // spells.
    bool add_special_tokens = true;
  };
  struct DecodeOptions {
    bool skip_special_tokens = true;
  };

  virtual ~Tokenizer() = default;

  // Every id is in [0, vocab_size()). A model's own vocab_size may be larger, never smaller.
  virtual int64_t vocab_size() const = 0;
  // The id of exactly this token; none: nullopt.
  virtual std::optional<int32_t> TokenId(absl::string_view token) const = 0;

  // kInvalidArgument for text that is no UTF-8, longer than kEncodeBytesMax, or (gene vocabulary) has unknown
  // words.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                                      const EncodeOptions& options) const = 0;
  // Must not outlive the tokenizer.
  virtual std::unique_ptr<TextStream> NewTextStream(const DecodeOptions& options) const = 0;

  std::string Decode(absl::Span<const int32_t> ids, const DecodeOptions& options) const;
};

// The tokenizer of a model folder: tokenizer.json if there is one, else tokenizer.model (SentencePiece), else
// genes.txt (gene_vocabulary.h). kNotFound: none of them. kUnimplemented names a component that is not
// supported.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder);

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_TOKENIZER_H_
