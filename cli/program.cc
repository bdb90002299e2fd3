#include "cli/program.h"

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Error.hpp"
#include "CLI/Formatter.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_replace.h"
#include "base/heap.h"
#include "cli/command.h"

namespace eduba {
namespace {

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

// "session append": the subcommands as far as they were understood.
std::string ChosenPath(const CLI::App& app) {
  std::string path;
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    path += (path.empty() ? "" : " ") + command->get_name();
  }
  return path;
}

// One line, whatever is in the message.
void PrintError(const std::string& path, const std::string& message) {
  std::cerr << "eduba: " << path << (path.empty() ? "" : ": ")
            << absl::StrReplaceAll(message, {{"\r\n", "; "}, {"\n", "; "}, {"\r", " "}}) << std::endl;
}

int Main(int argc, char** argv) {
  CLI::App app("eduba: exact, reproducible attention over sequences that many machines hold together",
               "eduba");
  app.require_subcommand(1);
  app.footer("Exit codes: 0 done, 1 failed, 2 bad usage. EDUBA_SERVER names the server for all clients.");
  Command chosen;
  AddServeCommands(app, chosen);
  AddSessionCommands(app, chosen);
  AddModelCommands(app, chosen);
  AddAtlasCommands(app, chosen);
  AddBenchCommands(app, chosen);
  AddInfoCommands(app, chosen);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {  // --help
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    const std::string path = ChosenPath(app);
    // CLI11 says of a word that is no command only that one is missing.
    const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
    const std::string what = unknown.empty() ? error.what() : "'" + unknown.front() + "' is not understood";
    PrintError(path, what + "; see 'eduba " + path + (path.empty() ? "" : " ") + "--help'");
    return kBadUsage;
  }
  const absl::Status status = chosen();
  if (status.ok()) return 0;
  if (!IsAlreadyTold(status)) PrintError(ChosenPath(app), std::string(status.message()));
  return kFailed;
}

}  // namespace

int RunProgram(int argc, char** argv) {
  KeepFreedMemory();
  // gRPC's own log would come before our one line. Here, and so in child processes, before gRPC reads it; who
  // sets it himself keeps it.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  try {
    return Main(argc, argv);
  } catch (const std::exception& error) {
    // Nothing of ours throws; this is memory, or a library that gave up.
    std::cerr << "eduba: internal error: " << error.what() << std::endl;
    return kFailed;
  }
}

}  // namespace eduba
