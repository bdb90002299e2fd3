#include "model/tokenizer/sentencepiece_library.h"

#include <sentencepiece_processor.h>

namespace eduba {

SentencePieceLibrary::SentencePieceLibrary()
    : processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {}
SentencePieceLibrary::~SentencePieceLibrary() = default;

std::unique_ptr<SentencePieceLibrary> SentencePieceLibrary::Load(std::string_view model) {
  auto library = std::unique_ptr<SentencePieceLibrary>(new SentencePieceLibrary());
  if (!library->processor_->LoadFromSerializedProto(model).ok()) return nullptr;
  return library;
}

int SentencePieceLibrary::size() const { return processor_->GetPieceSize(); }
const std::string& SentencePieceLibrary::Piece(int id) const { return processor_->IdToPiece(id); }
bool SentencePieceLibrary::IsControl(int id) const { return processor_->IsControl(id); }
bool SentencePieceLibrary::IsUnknown(int id) const { return processor_->IsUnknown(id); }
bool SentencePieceLibrary::IsByte(int id) const { return processor_->IsByte(id); }
int SentencePieceLibrary::bos_id() const { return processor_->bos_id(); }
int SentencePieceLibrary::eos_id() const { return processor_->eos_id(); }
int SentencePieceLibrary::PieceToId(std::string_view piece) const { return processor_->PieceToId(piece); }

std::optional<std::vector<int>> SentencePieceLibrary::Encode(std::string_view text) const {
  std::vector<int> ids;
  if (!processor_->Encode(text, &ids).ok()) return std::nullopt;
  return ids;
}

std::string SentencePieceLibrary::Decode(const std::vector<int>& ids) const {
  std::string text;
  return processor_->Decode(ids, &text).ok() ? text : std::string();
}

}  // namespace eduba
