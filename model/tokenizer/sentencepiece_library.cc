#include "model/tokenizer/sentencepiece_library.h"

#include <dlfcn.h>
#include <sentencepiece_processor.h>

#include <new>

#include "base/log.h"

// Debian's libsentencepiece brings a protobuf of its own and exports it. Linked beside the libprotobuf that
// gRPC needs, whichever comes first answers for both, and the program dies before main(). So the library is
// opened in isolation instead: its names are seen by nobody else, and it sees its own before others'.
// Everything that is used of it is virtual; by name we need its constructor, and util::Status's destructor.

// Sanitizers do not run with deep binding; what they test has no second protobuf.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define EDUBA_DEEP_BINDING 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define EDUBA_DEEP_BINDING 0
#endif
#endif
#ifndef EDUBA_DEEP_BINDING
#define EDUBA_DEEP_BINDING RTLD_DEEPBIND
#endif

namespace eduba {
namespace {

using Function = void (*)(void*);

struct OpenedLibrary {
  Function construct_processor = nullptr;
  Function destroy_status = nullptr;
};

// Opened once and never closed. Without functions: it is not installed.
const OpenedLibrary& Opened() {
  static const OpenedLibrary opened = [] {
    OpenedLibrary functions;
    void* const library = dlopen("libsentencepiece.so.0", RTLD_NOW | RTLD_LOCAL | EDUBA_DEEP_BINDING);
    if (library == nullptr) {
      LogError(std::string("tokenizer.model needs libsentencepiece0, which does not load: ") + dlerror());
      return functions;
    }
    functions.construct_processor =
        reinterpret_cast<Function>(dlsym(library, "_ZN13sentencepiece22SentencePieceProcessorC1Ev"));
    functions.destroy_status =
        reinterpret_cast<Function>(dlsym(library, "_ZN13sentencepiece4util6StatusD1Ev"));
    return functions;
  }();
  return opened;
}

}  // namespace

// What the compiler calls where a util::Status goes.
extern "C" void EdubaDestroyStatus(void* status) __asm__("_ZN13sentencepiece4util6StatusD1Ev");
extern "C" void EdubaDestroyStatus(void* status) {
  // Load saw that it is there before anything could make a Status.
  Opened().destroy_status(status);  // NOLINT(clang-analyzer-core.CallAndMessage)
}

SentencePieceLibrary::SentencePieceLibrary() {
  void* const memory = ::operator new(sizeof(sentencepiece::SentencePieceProcessor));
  Opened().construct_processor(memory);
  processor_.reset(static_cast<sentencepiece::SentencePieceProcessor*>(memory));
}
SentencePieceLibrary::~SentencePieceLibrary() = default;

std::unique_ptr<SentencePieceLibrary> SentencePieceLibrary::Load(std::string_view model) {
  if (Opened().construct_processor == nullptr || Opened().destroy_status == nullptr) return nullptr;
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
