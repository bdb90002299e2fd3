#ifndef EDUBA_CLI_COMMAND_H_
#define EDUBA_CLI_COMMAND_H_

#include <functional>
#include <memory>
#include <string>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "absl/status/status.h"

namespace eduba {

// The command that the user chose: parsing sets it, main runs it. An error becomes one line on stderr,
// "eduba: <command>: <message>", and exit code 1; messages say what was found, what is wanted and what to do.
using Command = std::function<absl::Status()>;

// An error that the command has told itself, to whom it concerns: main prints nothing.
absl::Status AlreadyTold(absl::Status error);
bool IsAlreadyTold(const absl::Status& error);

// Adds subcommand `name`, whose options live in an Options that `add_options` fills in and `run` gets.
template <typename Options>
void AddCommand(CLI::App& parent, const std::string& name, const std::string& description, Command& chosen,
                void (*add_options)(CLI::App& command, Options& options),
                absl::Status (*run)(const Options& options)) {
  auto options = std::make_shared<Options>();
  CLI::App* command = parent.add_subcommand(name, description);
  add_options(*command, *options);
  command->callback([options, run, &chosen] { chosen = [options, run] { return run(*options); }; });
}

// One function for each group of commands, in the file of that name. `chosen` must outlive `app`.
void AddServeCommands(CLI::App& app, Command& chosen);    // up, coordinator, worker
void AddSessionCommands(CLI::App& app, Command& chosen);  // session ...
void AddModelCommands(CLI::App& app, Command& chosen);    // generate, score, embed, model ...
void AddAtlasCommands(CLI::App& app, Command& chosen);    // atlas ...
void AddBenchCommands(CLI::App& app, Command& chosen);    // bench ...
void AddInfoCommands(CLI::App& app, Command& chosen);     // workers, doctor, version

}  // namespace eduba

#endif  // EDUBA_CLI_COMMAND_H_
