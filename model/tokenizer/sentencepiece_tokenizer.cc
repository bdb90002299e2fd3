#include "model/tokenizer/sentencepiece_tokenizer.h"

#include <cstdio>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

constexpr absl::string_view kSpace = "\xE2\x96\x81";  // U+2581, how pieces write a space.

// The few fields of a sentencepiece.ModelProto that decoding depends on, which the library does not tell.
struct DecodeSpec {
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool whitespace_as_suffix = false;
  bool denormalizes = false;
  std::string unknown_surface = " \xE2\x81\x87 ";
};

// Reads protobuf's wire format, field by field. The library has parsed the same bytes before, so a mistake
// only ends it.
class WireReader {
 public:
  explicit WireReader(absl::string_view bytes) : rest_(bytes) {}

  // The next field; false at the end.
  bool Next() {
    const std::optional<uint64_t> key = Varint();
    if (!key.has_value()) return false;
    field_ = *key >> 3;
    number_ = 0;
    bytes_ = "";
    switch (*key & 7) {
      case 0: {
        const std::optional<uint64_t> number = Varint();
        number_ = number.value_or(0);
        return number.has_value();
      }
      case 1:
        return Take(8);
      case 2: {
        const std::optional<uint64_t> length = Varint();
        return length.has_value() && Take(*length);
      }
      case 5:
        return Take(4);
      default:
        return false;
    }
  }
  uint64_t field() const { return field_; }
  uint64_t number() const { return number_; }
  absl::string_view bytes() const { return bytes_; }

 private:
  std::optional<uint64_t> Varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && !rest_.empty(); shift += 7) {
      const auto byte = static_cast<uint8_t>(rest_[0]);
      rest_.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    return std::nullopt;
  }
  bool Take(uint64_t size) {
    if (size > rest_.size()) return false;
    bytes_ = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return true;
  }

  absl::string_view rest_;
  uint64_t field_ = 0;
  uint64_t number_ = 0;
  absl::string_view bytes_;
};

// Field numbers of sentencepiece_model.proto.
DecodeSpec ReadDecodeSpec(absl::string_view model) {
  constexpr uint64_t kTrainerSpec = 2;
  constexpr uint64_t kNormalizerSpec = 3;
  constexpr uint64_t kDenormalizerSpec = 5;
  constexpr uint64_t kTreatWhitespaceAsSuffix = 24;
  constexpr uint64_t kUnkSurface = 44;
  constexpr uint64_t kPrecompiledCharsmap = 2;
  constexpr uint64_t kAddDummyPrefix = 3;
  constexpr uint64_t kRemoveExtraWhitespaces = 4;
  DecodeSpec spec;
  for (WireReader top(model); top.Next();) {
    for (WireReader inner(top.bytes()); top.field() != 1 && inner.Next();) {
      if (top.field() == kTrainerSpec) {
        if (inner.field() == kTreatWhitespaceAsSuffix) spec.whitespace_as_suffix = inner.number() != 0;
        if (inner.field() == kUnkSurface) spec.unknown_surface = std::string(inner.bytes());
      } else if (top.field() == kNormalizerSpec) {
        if (inner.field() == kAddDummyPrefix) spec.add_dummy_prefix = inner.number() != 0;
        if (inner.field() == kRemoveExtraWhitespaces) spec.remove_extra_whitespaces = inner.number() != 0;
      } else if (top.field() == kDenormalizerSpec) {
        if (inner.field() == kPrecompiledCharsmap) spec.denormalizes = !inner.bytes().empty();
      }
    }
  }
  return spec;
}

}  // namespace

// What SentencePieceProcessor::Decode does, a token at a time.
class SentencePieceTokenizer::Stream : public TextStream {
 public:
  explicit Stream(const SentencePieceTokenizer& tokenizer) : tokenizer_(tokenizer) {}

  std::string Push(int32_t id) override {
    if (id < 0 || id >= tokenizer_.vocab_size()) return "";
    const Piece& piece = tokenizer_.pieces_[id];
    if (piece.kind == Piece::Kind::kByte) return Note(bytes_.Push(piece.text));
    std::string text = Note(bytes_.Finish());
    if (piece.kind != Piece::Kind::kText) return text + Note(piece.text);
    absl::string_view rest = piece.text;
    if (at_start_) {
      if (tokenizer_.strips_first_space_ && absl::ConsumePrefix(&rest, " ")) {
        // A second piece may lose its space only where all spaces go.
        at_start_ = tokenizer_.strips_all_spaces_;
      }
    }
    return text + Note(std::string(rest));
  }
  std::string Finish() override { return bytes_.Finish(); }

 private:
  // The start has ended with the first text.
  std::string Note(std::string text) {
    if (!text.empty()) at_start_ = false;
    return text;
  }

  const SentencePieceTokenizer& tokenizer_;
  Utf8Assembler bytes_{Utf8Assembler::Invalid::kByte};
  bool at_start_ = true;
};

absl::StatusOr<std::unique_ptr<SentencePieceTokenizer>> SentencePieceTokenizer::Parse(
    absl::string_view model, const SentencePieceOptions& options, const std::string& name) {
  auto tokenizer = std::unique_ptr<SentencePieceTokenizer>(new SentencePieceTokenizer());
  tokenizer->library_ = SentencePieceLibrary::Load({model.data(), model.size()});
  if (tokenizer->library_ == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": not a SentencePiece model; is the download complete?"));
  }
  const SentencePieceLibrary& library = *tokenizer->library_;
  const DecodeSpec spec = ReadDecodeSpec(model);
  if (spec.denormalizes) {
    return absl::UnimplementedError(absl::StrCat(name, ": a denormalizer_spec is not supported"));
  }
  if (spec.whitespace_as_suffix) {
    return absl::UnimplementedError(absl::StrCat(name, ": treat_whitespace_as_suffix is not supported"));
  }
  tokenizer->strips_first_space_ = spec.add_dummy_prefix || spec.remove_extra_whitespaces;
  tokenizer->strips_all_spaces_ = spec.remove_extra_whitespaces;

  for (int id = 0; id < library.size(); ++id) {
    Piece piece;
    const std::string& text = library.Piece(id);
    if (!CheckUtf8(text).ok()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": piece ", id, " is no UTF-8"));
    }
    if (library.IsControl(id)) {
      piece.kind = Piece::Kind::kControl;
    } else if (library.IsUnknown(id)) {
      piece.kind = Piece::Kind::kUnknown;
      piece.text = spec.unknown_surface;
    } else if (library.IsByte(id)) {
      piece.kind = Piece::Kind::kByte;
      unsigned byte = 0;
      if (text.size() != 6 || !absl::StartsWith(text, "<0x") || sscanf(text.c_str() + 3, "%2x", &byte) != 1) {
        return absl::InvalidArgumentError(absl::StrCat(name, ": piece ", id, " is no byte"));
      }
      piece.text = std::string(1, static_cast<char>(byte));
    } else {
      piece.text = absl::StrReplaceAll(text, {{kSpace, " "}});
    }
    tokenizer->pieces_.push_back(std::move(piece));
  }
  if (options.add_bos && library.bos_id() >= 0) tokenizer->before_.push_back(library.bos_id());
  if (options.add_eos && library.eos_id() >= 0) tokenizer->after_.push_back(library.eos_id());
  return tokenizer;
}

std::optional<int32_t> SentencePieceTokenizer::TokenId(absl::string_view token) const {
  const int id = library_->PieceToId({token.data(), token.size()});
  // Unknown pieces have the unknown piece's id.
  if (id < 0 || id >= library_->size() || library_->Piece(id) != token) return std::nullopt;
  return id;
}

absl::StatusOr<std::vector<int32_t>> SentencePieceTokenizer::Encode(absl::string_view text,
                                                                    const EncodeOptions& options) const {
  if (static_cast<int64_t>(text.size()) > kEncodeBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("text of ", text.size(), " bytes, at most ",
                                                   kEncodeBytesMax, " at once; encode it in parts"));
  }
  EDUBA_RETURN_IF_ERROR(CheckUtf8(text));
  const auto encoded = library_->Encode({text.data(), text.size()});
  if (!encoded.has_value()) return absl::InternalError("SentencePiece cannot encode the text");
  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = before_;
  ids.insert(ids.end(), encoded->begin(), encoded->end());
  if (options.add_special_tokens) ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

std::unique_ptr<TextStream> SentencePieceTokenizer::NewTextStream(const DecodeOptions&) const {
  return std::make_unique<Stream>(*this);
}

}  // namespace eduba
