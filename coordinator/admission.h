#ifndef EDUBA_COORDINATOR_ADMISSION_H_
#define EDUBA_COORDINATOR_ADMISSION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/records.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// Whether a worker may be in this coordinator's group, and beside which others. FAILED_PRECONDITION refuses
// it for good, UNAVAILABLE for now.

// The worker alone: its protocol, its transport, its node id, whose content it has, and whether the last
// coordinator that it obeyed had these records. The other arguments are the coordinator's.
absl::Status CheckHello(const v1::WorkerHello& hello, const std::string& transport,
                        const std::string& version, uint64_t cluster, const std::vector<Term>& terms);

// Beside a worker that has been admitted, and is another node: one group has one arithmetic, one model, and
// an address for each worker.
absl::Status CheckBeside(const v1::WorkerHello& hello, const v1::WorkerHello& other);

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_ADMISSION_H_
