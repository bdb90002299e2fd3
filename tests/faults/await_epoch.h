#ifndef EDUBA_TESTS_FAULTS_AWAIT_EPOCH_H_
#define EDUBA_TESTS_FAULTS_AWAIT_EPOCH_H_

#include <cstdint>

#include "absl/time/clock.h"
#include "client/client.h"
#include "gtest/gtest.h"

namespace eduba {

// Waits until a group later than `epoch` is active; returns its epoch, or -1 where the coordinator does not
// answer, which fails the test.
inline int64_t AwaitEpochAfter(Client& client, int64_t epoch) {
  while (true) {
    const auto workers = client.ListWorkers();
    EXPECT_TRUE(workers.ok()) << workers.status();
    if (!workers.ok()) return -1;
    if (workers->state() == "active" && workers->epoch() > epoch) return workers->epoch();
    absl::SleepFor(absl::Milliseconds(20));
  }
}

}  // namespace eduba

#endif  // EDUBA_TESTS_FAULTS_AWAIT_EPOCH_H_
