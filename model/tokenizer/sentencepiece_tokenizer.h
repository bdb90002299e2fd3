#ifndef EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_
#define EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/tokenizer/sentencepiece_library.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

inline constexpr int64_t kSentencePieceBytesMax = int64_t{64} << 20;

struct SentencePieceOptions {
  bool add_bos = true;  // add_special_tokens puts the model's <s>, </s> around the text, if it has them.
  bool add_eos = false;
};

// A SentencePiece tokenizer.model. The library encodes; what it decodes to is put together here, because it
// only decodes whole sequences.
class SentencePieceTokenizer : public Tokenizer {
 public:
  // `model`: the file's bytes. kInvalidArgument: not such a model. kUnimplemented: one with a denormalizer,
  // or with white space as a suffix.
  static absl::StatusOr<std::unique_ptr<SentencePieceTokenizer>> Parse(absl::string_view model,
                                                                       const SentencePieceOptions& options,
                                                                       const std::string& name);

  int64_t vocab_size() const override { return static_cast<int64_t>(pieces_.size()); }
  std::optional<int32_t> TokenId(absl::string_view token) const override;
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options) const override;
  // Control tokens never have text. An unknown token is the model's unk_surface.
  std::unique_ptr<TextStream> NewTextStream(const DecodeOptions& options) const override;

 private:
  class Stream;
  struct Piece {
    enum class Kind : uint8_t { kText, kByte, kUnknown, kControl } kind = Kind::kText;
    std::string text;  // The text that it is decoded to; kByte: the byte.
  };

  SentencePieceTokenizer() = default;

  std::unique_ptr<SentencePieceLibrary> library_;
  std::vector<Piece> pieces_;
  bool strips_first_space_ = true;  // The text's first space was not in the original,
  bool strips_all_spaces_ = true;   // or all of those at its start were not.
  std::vector<int32_t> before_;
  std::vector<int32_t> after_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_TOKENIZER_H_
