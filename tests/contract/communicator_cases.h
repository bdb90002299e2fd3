#ifndef EDUBA_TESTS_CONTRACT_COMMUNICATOR_CASES_H_
#define EDUBA_TESTS_CONTRACT_COMMUNICATOR_CASES_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collective/communicator.h"

namespace eduba {

struct CaseOptions {
  int rank = 0;
  int size = 2;  // At least 2.
  // How long ranks wait for one that does not come.
  absl::Duration patience = absl::Seconds(1);
  // Joins this rank to the group of that name, of `size` ranks.
  std::function<absl::StatusOr<std::unique_ptr<Communicator>>(const std::string& name, absl::Time deadline)>
      join;
  // Called with the name of each case before it begins.
  std::function<void(const std::string& name)> begins = [](const std::string& /*name*/) {};
};

// The essential cases of the contract of communicator_test.cc as one rank meets them, so that ranks can be
// processes. All ranks call it. Returns what was not as promised, a line for each case.
std::vector<std::string> BrokenPromises(const CaseOptions& options);

}  // namespace eduba

#endif  // EDUBA_TESTS_CONTRACT_COMMUNICATOR_CASES_H_
