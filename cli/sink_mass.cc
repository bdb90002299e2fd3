#include "cli/sink_mass.h"

#include "CLI/Option.hpp"
#include "absl/types/span.h"
#include "ingest/npy.h"

namespace eduba {

void AddSinkMassOption(CLI::App& command, std::string& path) {
  command.add_option(
      "--sink-mass", path,
      "m.npy to write: f32 [layers, query_heads], the token sinks' share of each head's weights, "
      "averaged over the tokens");
}

absl::Status WriteSinkMass(const std::string& path, const v1::Model& model, const std::vector<float>& mass) {
  return WriteNpy(path, {model.layer_windows_size(), model.query_heads()}, absl::MakeConstSpan(mass));
}

}  // namespace eduba
