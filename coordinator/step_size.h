#ifndef EDUBA_COORDINATOR_STEP_SIZE_H_
#define EDUBA_COORDINATOR_STEP_SIZE_H_

#include <cstdint>

#include "base/placement.h"
#include "coordinator/batcher.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Multiply-adds for one row of a step on the busiest node, token sinks included.
int64_t RowWork(const v1::SessionSpec& spec, const Placement& placement, const BatchKey& key);

// What a step with so many multiply-adds on the busiest node gets beside the time that every command has.
int64_t StepExtraMs(int64_t work);

// The most rows of this kind that one step takes: bounded by messages, by the partials that workers must
// hold, and by a few seconds of work.
int StepRows(const v1::SessionSpec& spec, const Placement& placement, const BatchKey& key);

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_STEP_SIZE_H_
