#include "cli/command.h"

#include "absl/strings/cord.h"

namespace eduba {
namespace {

constexpr char kToldPayload[] = "eduba/already-told";

}  // namespace

absl::Status AlreadyTold(absl::Status error) {
  error.SetPayload(kToldPayload, absl::Cord());
  return error;
}

bool IsAlreadyTold(const absl::Status& error) { return error.GetPayload(kToldPayload).has_value(); }

}  // namespace eduba
