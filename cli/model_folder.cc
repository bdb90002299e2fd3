#include "cli/model_folder.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace eduba {
namespace {

namespace fs = std::filesystem;

bool IsFolder(const fs::path& path) {
  std::error_code error;
  return fs::is_directory(path, error);
}

}  // namespace

const std::vector<std::string>& ShippedModels() {
  static const auto* const names = new std::vector<std::string>{"nano"};
  return *names;
}

absl::StatusOr<std::string> ModelFolder(const std::string& named) {
  const auto& shipped = ShippedModels();
  if (std::find(shipped.begin(), shipped.end(), named) == shipped.end()) {
    if (IsFolder(named)) return named;
    return absl::NotFoundError(absl::StrCat("found no folder '", named,
                                            "', wanted a model's folder, or nano, which comes with this "
                                            "program"));
  }
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
  const fs::path places[] = {program / "models" / named,
                             program.parent_path() / "share" / "eduba" / "models" / named};
  for (const fs::path& place : places) {
    if (IsFolder(place)) return place.string();
  }
  return absl::NotFoundError(absl::StrCat("found the model ", named, " neither in ", places[0].string(),
                                          " nor in ", places[1].string(),
                                          ", where it lies beside the program: give the folder "
                                          "(model/nano/weights of the repository)"));
}

}  // namespace eduba
