// eduba session show|list|delete|fork. (create, append and attend have files of their own.)

#include <iostream>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "cli/session_commands.h"
#include "cli/session_text.h"

namespace eduba {
namespace {

struct NameOptions {
  ServerFlags server;
  bool json = false;
  std::string name;
};

void AddNameOptions(CLI::App& command, NameOptions& options) {
  command.add_option("NAME", options.name, "The session")->required();
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

absl::Status RunShow(const NameOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, Connect(options.server)->GetSession(options.name));
  ReportSession(session, options.json);
  return absl::OkStatus();
}

absl::Status RunDelete(const NameOptions& options) {
  EDUBA_RETURN_IF_ERROR(Connect(options.server)->DeleteSession(options.name));
  if (options.json) {
    PrintJson({{"deleted", options.name}});
  } else {
    std::cout << "deleted " << options.name << std::endl;
  }
  return absl::OkStatus();
}

struct ForkOptions {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string fork;
};

void AddForkOptions(CLI::App& command, ForkOptions& options) {
  command.add_option("NAME", options.name, "The session, of the workers' model")->required();
  command.add_option("NEW", options.fork, "Name of the new one")->required();
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

absl::Status RunFork(const ForkOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session,
                         Connect(options.server)->ForkSession(options.name, options.fork));
  ReportSession(session, options.json);
  return absl::OkStatus();
}

struct ListOptions {
  ServerFlags server;
  bool json = false;
};

void AddListOptions(CLI::App& command, ListOptions& options) {
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

absl::Status RunList(const ListOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto sessions, Connect(options.server)->ListSessions());
  if (options.json) {
    Json list = Json::array();
    for (const v1::Session& session : sessions) list.push_back(SessionJson(session));
    PrintJson(list);
    return absl::OkStatus();
  }
  std::vector<std::vector<std::string>> rows = {{"session", "length", "bytes", "dtype", "state"}};
  for (const v1::Session& session : sessions) {
    rows.push_back({session.name(), absl::StrCat(session.length()), BytesText(session.bytes()),
                    DTypeText(session.spec().dtype()), session.lost() ? "lost" : "ok"});
  }
  PrintTable(rows);
  return absl::OkStatus();
}

}  // namespace

void AddSessionCommands(CLI::App& app, Command& chosen) {
  CLI::App* session = app.add_subcommand("session", "Create, fill, ask, show and delete sessions");
  session->require_subcommand(1);
  AddCreateCommand(*session, chosen);
  AddAppendCommand(*session, chosen);
  AddCommand(*session, "fork", "A new session with the same tokens, on the same memory", chosen,
             AddForkOptions, RunFork);
  AddAttendCommand(*session, chosen);
  AddCommand(*session, "show", "Show one session", chosen, AddNameOptions, RunShow);
  AddCommand(*session, "list", "List all sessions", chosen, AddListOptions, RunList);
  AddCommand(*session, "delete", "Delete a session and free its memory", chosen, AddNameOptions, RunDelete);
}

}  // namespace eduba
