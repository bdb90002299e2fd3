#ifndef EDUBA_CLI_SESSION_COMMANDS_H_
#define EDUBA_CLI_SESSION_COMMANDS_H_

#include "CLI/App.hpp"
#include "cli/command.h"

namespace eduba {

// The larger of eduba session ..., each in its own file.
void AddCreateCommand(CLI::App& session, Command& chosen);
void AddAppendCommand(CLI::App& session, Command& chosen);
void AddAttendCommand(CLI::App& session, Command& chosen);

}  // namespace eduba

#endif  // EDUBA_CLI_SESSION_COMMANDS_H_
