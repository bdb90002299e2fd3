#include "coordinator/admission.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

std::string ModelHeld(const v1::WorkerHello& hello) {
  return hello.has_model() ? absl::StrCat("model ", hello.model().name()) : std::string("no model");
}

bool SameModel(const v1::WorkerHello& a, const v1::WorkerHello& b) {
  return a.has_model() == b.has_model() && a.model().hash() == b.model().hash() &&
         a.model().tokenizer_hash() == b.model().tokenizer_hash() &&
         a.model().session_defaults().SerializeAsString() == b.model().session_defaults().SerializeAsString();
}

}  // namespace

absl::Status CheckHello(const v1::WorkerHello& hello, const std::string& transport,
                        const std::string& version, uint64_t cluster, const std::vector<Term>& terms) {
  if (hello.protocol() != kGroupProtocol) {
    return absl::FailedPreconditionError(absl::StrCat(
        "worker ", hello.address(), " speaks protocol ", hello.protocol(), " (version ", hello.version(),
        "), the coordinator ", kGroupProtocol, " (version ", version, "): start both from the same version"));
  }
  if (hello.transport() != transport) {
    return absl::FailedPreconditionError(absl::StrCat(
        "worker ", hello.address(), " joins groups over '", hello.transport(),
        "', this coordinator's workers over '", transport, "': start both with the same --transport"));
  }
  if (hello.node().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", hello.address(), " has no node id: its content could not be found again"));
  }
  if (hello.cluster() != 0 && hello.cluster() != cluster) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", hello.address(), " (node ", hello.node(),
                     ") holds sessions of other records than this "
                     "coordinator's: start the coordinator with the --data-dir of those sessions, or the "
                     "worker with another"));
  }
  const Term obeyed{hello.term(), hello.term_nonce()};
  if (hello.cluster() != 0 && obeyed.number != 0 &&
      std::find(terms.begin(), terms.end(), obeyed) == terms.end()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "worker ", hello.address(), " (node ", hello.node(), ") obeyed a coordinator of term ", obeyed.number,
        " of which these records know nothing: they are an earlier copy, or another coordinator runs with a "
        "copy; start the coordinator with the newest records, and only one"));
  }
  return absl::OkStatus();
}

absl::Status CheckBeside(const v1::WorkerHello& hello, const v1::WorkerHello& other) {
  if (other.address() == hello.address()) {
    return absl::UnavailableError(
        absl::StrCat("another worker with the address ", hello.address(),
                     " is there: come again when it has left, or give each its own --listen"));
  }
  if (other.fingerprint() != hello.fingerprint()) {
    return absl::FailedPreconditionError(absl::StrCat("worker ", hello.address(), " (", hello.backend(),
                                                      ") is refused: its arithmetic differs from that of ",
                                                      other.address(), " (", other.backend(),
                                                      "): another kind of CPU or GPU, another library or "
                                                      "build; answers would not be the same bits. Use equal "
                                                      "machines and one build"));
  }
  if (!SameModel(hello, other)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "worker ", hello.address(), " is refused: it holds ", ModelHeld(hello), ", and ", other.address(),
        " holds ", ModelHeld(other),
        ", with other weights, another configuration, another tokenizer or another streaming.json: give all "
        "workers of a group one --model"));
  }
  return absl::OkStatus();
}

}  // namespace eduba
