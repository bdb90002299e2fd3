#ifndef EDUBA_CLI_SESSION_ATTEND_H_
#define EDUBA_CLI_SESSION_ATTEND_H_

#include "CLI/App.hpp"
#include "cli/command.h"

namespace eduba {

// eduba session attend
void AddAttendCommand(CLI::App& session, Command& chosen);

}  // namespace eduba

#endif  // EDUBA_CLI_SESSION_ATTEND_H_
