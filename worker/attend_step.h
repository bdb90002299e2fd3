#ifndef EDUBA_WORKER_ATTEND_STEP_H_
#define EDUBA_WORKER_ATTEND_STEP_H_

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attention/sequence.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "worker/membership.h"

namespace eduba {

// Answers rows of one layer together with the other ranks, which all make the same call. `sequence` null:
// this worker does not have the session.
//   INVALID_ARGUMENT, OUT_OF_RANGE  the step is wrong, or its numbers leave the finite range; every rank
//                                   finds the same
//   any other error                 the group is over (Membership::EndIfBroken)
absl::StatusOr<v1::AttendResult> Attend(Backend& backend, Membership& membership, const Sequence* sequence,
                                        const v1::AttendStep& step, absl::Time deadline);

// An error of a collective, with a code that means that the group is over: any but INVALID_ARGUMENT.
absl::Status BrokenGroup(const absl::Status& status);

}  // namespace eduba

#endif  // EDUBA_WORKER_ATTEND_STEP_H_
