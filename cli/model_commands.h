#ifndef EDUBA_CLI_MODEL_COMMANDS_H_
#define EDUBA_CLI_MODEL_COMMANDS_H_

#include "CLI/App.hpp"
#include "cli/command.h"

namespace eduba {

// What sessions of the workers' model are asked, each in its own file.
void AddGenerateCommand(CLI::App& app, Command& chosen);
void AddScoreCommand(CLI::App& app, Command& chosen);
void AddEmbedCommand(CLI::App& app, Command& chosen);

}  // namespace eduba

#endif  // EDUBA_CLI_MODEL_COMMANDS_H_
