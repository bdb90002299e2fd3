#ifndef EDUBA_CLI_SINK_MASS_H_
#define EDUBA_CLI_SINK_MASS_H_

#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/status.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// --sink-mass FILE: where the token sinks' shares of attention are written.
void AddSinkMassOption(CLI::App& command, std::string& path);

// `mass` as an array [layers, query_heads] of the model.
absl::Status WriteSinkMass(const std::string& path, const v1::Model& model, const std::vector<float>& mass);

}  // namespace eduba

#endif  // EDUBA_CLI_SINK_MASS_H_
