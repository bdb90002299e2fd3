// eduba model list, model show.

#include <filesystem>
#include <iostream>
#include <string>
#include <system_error>
#include <vector>

#include "CLI/Option.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_commands.h"
#include "cli/model_folder.h"
#include "cli/model_text.h"
#include "cli/output.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

struct ShowFlags {
  ServerFlags server;
  bool json = false;
};

void AddShowOptions(CLI::App& command, ShowFlags& flags) {
  AddServerFlags(command, flags.server);
  AddJsonFlag(command, flags.json);
}

// What a new session gets where it is not told otherwise.
Json DefaultsJson(const v1::Model& model) {
  if (!model.has_session_defaults()) return Json();
  const v1::ModelSpec& defaults = model.session_defaults();
  Json json = Json::object();
  if (defaults.policy() != v1::MODEL_POLICY_UNSPECIFIED) json["policy"] = PolicyText(defaults);
  if (defaults.positions() != v1::POSITION_MODE_UNSPECIFIED) json["positions"] = PositionsText(defaults);
  if (defaults.window() > 0) json["window"] = defaults.window();
  if (defaults.has_sink_tokens()) json["sink_tokens"] = defaults.sink_tokens();
  if (defaults.has_sink_token()) json["sink_token"] = defaults.sink_token();
  return json;
}

std::string DefaultsText(const v1::Model& model) {
  std::vector<std::string> parts;
  const Json defaults = DefaultsJson(model);
  for (const auto& [key, value] : defaults.items()) {
    parts.push_back(absl::StrCat(key, " ", value.is_string() ? value.get<std::string>() : value.dump()));
  }
  return parts.empty() ? "as the program has them" : absl::StrJoin(parts, ", ");
}

absl::Status RunShow(const ShowFlags& flags) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Model model, Connect(flags.server)->GetModel());
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, DTypeFromProto(model.dtype()));
  const std::string hash = absl::StrFormat("%016x", model.hash());
  const std::vector<int64_t> windows(model.layer_windows().begin(), model.layer_windows().end());
  if (flags.json) {
    PrintJson({{"name", model.name()},
               {"family", model.family()},
               {"folder", model.folder()},
               {"hash", hash},
               {"vocab_size", model.vocab_size()},
               {"hidden_size", model.hidden_size()},
               {"query_heads", model.query_heads()},
               {"kv_heads", model.kv_heads()},
               {"head_dim", model.head_dim()},
               {"kv_dtype", DTypeName(dtype)},
               {"layer_windows", windows},
               {"trained_positions", model.trained_positions()},
               {"tokenizer", model.tokenizer()},
               {"eos_tokens", std::vector<int32_t>(model.eos_tokens().begin(), model.eos_tokens().end())},
               {"session_defaults", DefaultsJson(model)}});
    return absl::OkStatus();
  }
  PrintTable({{"model", model.name()},
              {"family", model.family()},
              {"folder", model.folder()},
              {"hash", hash},
              {"vocabulary", absl::StrCat(model.vocab_size(), " tokens")},
              {"tokenizer", model.tokenizer().empty() ? "none" : model.tokenizer()},
              {"hidden", absl::StrCat(model.hidden_size(), " numbers")},
              {"heads", absl::StrFormat("%d query, %d kv, head_dim %d, kept as %s", model.query_heads(),
                                        model.kv_heads(), model.head_dim(), DTypeName(dtype))},
              {"windows", absl::StrCat(absl::StrJoin(windows, " "), " (one a layer; 0 sees all)")},
              {"trained for", absl::StrCat(model.trained_positions(), " positions")},
              {"sessions", DefaultsText(model)}});
  return absl::OkStatus();
}

// Bytes of all files in the folder.
int64_t FolderBytes(const std::string& folder) {
  int64_t bytes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.is_regular_file(error)) bytes += static_cast<int64_t>(entry.file_size(error));
  }
  return bytes;
}

absl::Status RunList(const ShowFlags& flags) {
  Json list = Json::array();
  std::vector<std::vector<std::string>> rows = {{"model", "where", "size", "folder"}};
  for (const std::string& name : ShippedModels()) {
    const absl::StatusOr<std::string> folder = ModelFolder(name);
    if (!folder.ok()) continue;
    const int64_t bytes = FolderBytes(*folder);
    list.push_back({{"name", name}, {"served", false}, {"bytes", bytes}, {"folder", *folder}});
    rows.push_back({name, absl::StrCat("up --model ", name), BytesText(bytes), *folder});
  }
  const absl::StatusOr<v1::Model> held = Connect(flags.server)->GetModel();
  // No server, or none with a model, is an answer here.
  const bool none = absl::IsUnavailable(held.status()) || absl::IsFailedPrecondition(held.status());
  if (!held.ok() && !none) return held.status();
  if (held.ok()) {
    list.push_back(
        {{"name", held->name()}, {"served", true}, {"bytes", held->bytes()}, {"folder", held->folder()}});
    rows.push_back({held->name(), flags.server.server, BytesText(held->bytes()), held->folder()});
  }
  if (flags.json) {
    PrintJson(list);
    return absl::OkStatus();
  }
  PrintTable(rows);
  if (none) std::cout << flags.server.server << ": " << held.status().message() << std::endl;
  return absl::OkStatus();
}

}  // namespace

void AddModelCommands(CLI::App& app, Command& chosen) {
  AddGenerateCommand(app, chosen);
  AddScoreCommand(app, chosen);
  AddEmbedCommand(app, chosen);
  CLI::App* model =
      app.add_subcommand("model", "Models that come with the program, and the one that the workers hold");
  model->require_subcommand(1);
  AddCommand(*model, "list", "What can be served by name, and what the server holds", chosen, AddShowOptions,
             RunList);
  AddCommand(*model, "show", "Show the one that the workers hold", chosen, AddShowOptions, RunShow);
}

}  // namespace eduba
