#ifndef EDUBA_RPC_SPEC_H_
#define EDUBA_RPC_SPEC_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Fills in the defaults of a client's spec (layers, value_dim, dtype, scale, stripe_pages; one sink logit
// becomes one per query head) and checks every bound. INVALID_ARGUMENT names the field, what was found and
// what is allowed.
absl::StatusOr<v1::SessionSpec> CompleteSpec(const v1::SessionSpec& spec);

// A client's spec of a model session, filled in with the model's session defaults (field by field, where the
// others allow them) and ours, and with the model's shape, hash and dtype, and checked: CompleteSpec then
// leaves it as it is. INVALID_ARGUMENT as above, also for fields that are the model's to say. REQUIRES:
// given.has_model().
absl::StatusOr<v1::SessionSpec> CompleteModelSpec(const v1::SessionSpec& given, const v1::Model& model);

// How many of a session's first positions hold its own sink token (ModelSpec.sink_token). 0: it has none.
int64_t DedicatedSinks(const v1::SessionSpec& spec);

// INVALID_ARGUMENT names what of the request, its sampling options aside, is out of range.
// FAILED_PRECONDITION: it has stop strings, and the model no tokenizer.
absl::Status CheckGenerateRequest(const v1::GenerateRequest& request, const v1::Model& model);

// 1 to 128 of A-Z a-z 0-9 . _ -
absl::Status ValidateSessionName(const std::string& name);

absl::StatusOr<DType> DTypeFromProto(v1::DType dtype);
v1::DType DTypeToProto(DType dtype);

// The bytes of the keys and values that `length` positions of a model session leave stored, over all layers.
// REQUIRES: a completed spec.
int64_t ModelSessionBytes(const v1::SessionSpec& spec, const v1::Model& model, int64_t length);

// Whether every layer of a model session lets a row see a window at most, besides token sinks. Only then may
// one rank generate alone, without the keys of the others. Coordinator and workers both ask this function.
// REQUIRES: as above.
bool EveryLayerSeesAWindow(const v1::SessionSpec& spec, const v1::Model& model);

// Bytes of one position of one layer, as stored: keys and values of all KV heads. REQUIRES: a completed spec.
int64_t PositionBytes(const v1::SessionSpec& spec);

}  // namespace eduba

#endif  // EDUBA_RPC_SPEC_H_
