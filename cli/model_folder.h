#ifndef EDUBA_CLI_MODEL_FOLDER_H_
#define EDUBA_CLI_MODEL_FOLDER_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace eduba {

// Models that come with the program, which a command line calls by name.
const std::vector<std::string>& ShippedModels();

// The folder that `--model named` means. The name of a shipped model is that model, found from where this
// program lies (models/NAME beside it in a build tree, ../share/eduba/models/NAME where it is installed);
// anything else is a path, also "./nano" for a folder of that name. NOT_FOUND says what was looked for.
absl::StatusOr<std::string> ModelFolder(const std::string& named);

}  // namespace eduba

#endif  // EDUBA_CLI_MODEL_FOLDER_H_
