#ifndef EDUBA_CLI_SESSION_CELLS_H_
#define EDUBA_CLI_SESSION_CELLS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "cli/cell_tokens.h"
#include "client/client.h"

namespace eduba {

// session append --cells: appends the cells of a file to a model session, block by block, and writes where
// each of them is. `tokenizer`: its folder; "": the model's. Where it ends early, the same with `at` goes on.
absl::Status AppendCells(Client& client, const std::string& session, const CellFlags& cells,
                         const std::string& tokenizer, std::optional<int64_t> at, bool json);

}  // namespace eduba

#endif  // EDUBA_CLI_SESSION_CELLS_H_
