#ifndef EDUBA_CLI_MODEL_TEXT_H_
#define EDUBA_CLI_MODEL_TEXT_H_

#include <string>

#include "eduba/v1/eduba.pb.h"

namespace eduba {

// How model sessions are told to people. Unspecified is told as what it means without defaults.
std::string PolicyText(const v1::ModelSpec& model);
std::string PositionsText(const v1::ModelSpec& model);
// "policy streaming, rolling positions, window 256, 4 sink tokens"
std::string ModelSpecText(const v1::ModelSpec& model);

}  // namespace eduba

#endif  // EDUBA_CLI_MODEL_TEXT_H_
