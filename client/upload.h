#ifndef EDUBA_CLIENT_UPLOAD_H_
#define EDUBA_CLIENT_UPLOAD_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Step 2 of an append (docs/flows.md): sends every worker of the plan its rows, over parallel streams. OK
// when all workers have said that they received all of it. The first error ends all streams.
absl::Status UploadToWorkers(const v1::SessionSpec& spec, const v1::AppendPlan& plan, const RowSource& source,
                             const Progress& progress, absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_CLIENT_UPLOAD_H_
