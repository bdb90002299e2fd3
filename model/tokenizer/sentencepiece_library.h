#ifndef EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_LIBRARY_H_
#define EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_LIBRARY_H_

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace eduba {

// The part of libsentencepiece that is used, in the standard library's types: the library's header declares
// an absl::string_view of its own, so no file can include both it and Abseil.
class SentencePieceLibrary {
 public:
  // Null when `model` is no SentencePiece model, or the library is not installed (then it is logged).
  static std::unique_ptr<SentencePieceLibrary> Load(std::string_view model);
  ~SentencePieceLibrary();

  int size() const;
  const std::string& Piece(int id) const;
  bool IsControl(int id) const;
  bool IsUnknown(int id) const;
  bool IsByte(int id) const;
  int bos_id() const;  // -1: none
  int eos_id() const;
  // The unknown piece's id for all that is no piece.
  int PieceToId(std::string_view piece) const;

  // Nullopt when the library refuses the text.
  std::optional<std::vector<int>> Encode(std::string_view text) const;
  // For tests: what it decodes whole sequences to.
  std::string Decode(const std::vector<int>& ids) const;

 private:
  SentencePieceLibrary();
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_SENTENCEPIECE_LIBRARY_H_
