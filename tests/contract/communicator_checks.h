#ifndef EDUBA_TESTS_CONTRACT_COMMUNICATOR_CHECKS_H_
#define EDUBA_TESTS_CONTRACT_COMMUNICATOR_CHECKS_H_

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "collective/communicator.h"

// Calls of one rank whose results everybody knows, for tests whose ranks are threads and for those whose
// ranks are processes. Each returns the communicator's error, or DATA_LOSS where the result is wrong.
namespace eduba {

// So far away that a test which meets it has failed; so near that it fails by itself.
absl::Time Far();

// Any word, the same in every run: half of the sums wrap around.
int64_t Word(int rank, int64_t call, int64_t i);

// A sum of `count` words.
absl::Status SumAndCheck(Communicator& c, int64_t count, int64_t call, absl::Time deadline);

// `words` shared out in parts that all differ, the first of them empty where there are some ranks.
std::vector<int64_t> UnevenParts(int ranks, int64_t words);

// A reduce-scatter of `counts` [ranks] words.
absl::Status ScatterAndCheck(Communicator& c, const std::vector<int64_t>& counts, int64_t call,
                             absl::Time deadline);

// A maximum of `count` floats.
absl::Status MaxAndCheck(Communicator& c, int64_t count, int64_t call, absl::Time deadline);

// Who a rank sends to (-1: nobody) in a call, and how many bytes. Everybody knows it of everybody.
using Route = std::function<std::pair<int, int64_t>(int rank)>;

// One message.
absl::Status SendAndCheck(Communicator& c, const Route& route, int64_t call, absl::Time deadline);

// To the rank `shift` further on.
Route Ring(int ranks, int shift, int64_t count);

// A message from nobody to nobody.
absl::Status SendNothing(Communicator& c);

// Calls that are not the same: one rank makes `odd`, all others `most`.
struct Mismatch {
  const char* what;
  std::function<absl::Status(Communicator&)> most;
  std::function<absl::Status(Communicator&)> odd;
};
std::vector<Mismatch> Mismatches();

}  // namespace eduba

#endif  // EDUBA_TESTS_CONTRACT_COMMUNICATOR_CHECKS_H_
