#include "coordinator/outbox.h"

namespace eduba {

void Outbox::Emit(Effect effect) { effects_.push_back(std::move(effect)); }

void Outbox::Respond(RequestId request, absl::StatusOr<Answer> answer) {
  if (request != 0) Emit(Reply{request, std::move(answer)});
}

void Outbox::Log(std::string text) { Emit(Note{std::move(text)}); }

}  // namespace eduba
