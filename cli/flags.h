#ifndef EDUBA_CLI_FLAGS_H_
#define EDUBA_CLI_FLAGS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "CLI/App.hpp"
#include "client/client.h"

namespace eduba {

// --server and --timeout, of every command that asks a server.
struct ServerFlags {
  std::string server = "127.0.0.1:7070";
  double timeout_s = 600;
};
void AddServerFlags(CLI::App& command, ServerFlags& flags);
std::unique_ptr<Client> Connect(const ServerFlags& flags);

// --json, of every command that reports.
void AddJsonFlag(CLI::App& command, bool& json);

// An option that takes bytes as a number or with a unit: 8GiB, 512MiB, 1.5G (units are powers of 1024).
// Returns the option for further settings.
CLI::Option* AddBytesOption(CLI::App& command, const std::string& name, int64_t& bytes,
                            const std::string& description);

}  // namespace eduba

#endif  // EDUBA_CLI_FLAGS_H_
