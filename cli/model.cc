// eduba generate, score, embed, model list, model show.

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_folder.h"
#include "cli/model_text.h"
#include "cli/output.h"
#include "cli/tokens.h"
#include "ingest/npy.h"
#include "model/sampler.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// --- generate ---

struct GenerateFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  TokenFlags prompt;
  int64_t max_tokens = 0;
  float temperature = 0;
  int64_t top_k = 0;
  float top_p = 1;
  uint64_t seed = 0;
  std::vector<int32_t> stop_ids;
  std::vector<std::string> stop_strings;
  bool ignore_eos = false;
  std::string sink_mass;
};

constexpr char kSinkMassHelp[] =
    "m.npy to write: f32 [layers, query_heads], the token sinks' share of each head's weights, averaged over "
    "the tokens";

absl::Status WriteSinkMass(const std::string& path, const v1::Model& model, const std::vector<float>& mass) {
  return WriteNpy(path, {model.layer_windows_size(), model.query_heads()}, absl::MakeConstSpan(mass));
}

void AddGenerateOptions(CLI::App& command, GenerateFlags& flags) {
  command.add_option("NAME", flags.name, "The session")->required();
  auto* prompt = command.add_option("--prompt", flags.prompt.text, "Text to append first");
  command.add_option("--tokens", flags.prompt.ids_path, "ids.npy: integers [tokens], to append first")
      ->excludes(prompt);
  command.add_option("--tokenizer", flags.prompt.tokenizer, "Folder of the tokenizer [the model's]");
  command.add_option("--max-tokens", flags.max_tokens, "Tokens to generate at most")->required();
  command.add_option("--temperature", flags.temperature, "0: always the likeliest token")
      ->capture_default_str();
  command.add_option("--top-k", flags.top_k, "Draw from the k likeliest only [all]");
  command.add_option("--top-p", flags.top_p, "Draw from the likeliest that reach this probability together")
      ->capture_default_str();
  command.add_option("--seed", flags.seed, "Of the drawing: equal seeds, equal tokens")
      ->capture_default_str();
  command.add_option("--stop-id", flags.stop_ids, "Token id that ends it; may be repeated");
  command.add_option("--stop", flags.stop_strings, "Text that ends it; may be repeated");
  command.add_flag("--ignore-eos", flags.ignore_eos, "Go on behind the model's end-of-text tokens");
  command.add_option("--sink-mass", flags.sink_mass, kSinkMassHelp);
  AddServerFlags(command, flags.server);
  AddJsonFlag(command, flags.json);
}

std::string FinishText(v1::FinishReason reason) {
  if (reason == v1::FINISH_REASON_STOP) return "stop";
  return reason == v1::FINISH_REASON_DEADLINE ? "deadline" : "length";
}

template <typename T>
void TakeNumbers(const std::string& bytes, std::vector<T>* numbers) {
  const size_t before = numbers->size();
  numbers->resize(before + bytes.size() / sizeof(T));
  if (!bytes.empty()) {
    std::memcpy(numbers->data() + before, bytes.data(), bytes.size() / sizeof(T) * sizeof(T));
  }
}

absl::Status RunGenerate(const GenerateFlags& flags) {
  const auto client = Connect(flags.server);
  EDUBA_ASSIGN_OR_RETURN(const v1::Model model, client->GetModel());
  v1::GenerateRequest request;
  request.set_session(flags.name);
  request.set_max_tokens(flags.max_tokens);
  request.set_temperature(flags.temperature);
  request.set_top_k(flags.top_k);
  request.set_top_p(flags.top_p);
  request.set_seed(flags.seed);
  request.mutable_stop_ids()->Assign(flags.stop_ids.begin(), flags.stop_ids.end());
  if (!flags.ignore_eos) request.mutable_stop_ids()->MergeFrom(model.eos_tokens());
  for (const std::string& string : flags.stop_strings) request.add_stop_strings(string);
  request.set_sink_mass(!flags.sink_mass.empty());
  // The server would find the same, but behind the prompt, which would stay.
  EDUBA_RETURN_IF_ERROR(CheckGenerateRequest(request, model));
  EDUBA_RETURN_IF_ERROR(
      CheckSampling({flags.temperature, flags.top_k, flags.top_p == 0 ? 1 : flags.top_p, flags.seed}));

  int64_t prompt_tokens = 0;
  if (flags.prompt.any()) {
    EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client->GetSession(flags.name));
    const int64_t sinks = DedicatedSinks(session.spec());
    EDUBA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                           ReadTokens(*client, flags.prompt, session.length() <= sinks));
    AppendOptions append;
    append.at = std::max(session.length(), sinks);
    EDUBA_RETURN_IF_ERROR(client->AppendTokens(flags.name, ids, append).status());
    prompt_tokens = static_cast<int64_t>(ids.size());
  }
  const bool has_text = !model.tokenizer().empty();
  std::vector<int32_t> ids;
  std::vector<float> log_probs;
  std::string text;
  EDUBA_ASSIGN_OR_RETURN(const v1::GenerateSummary summary,
                         client->Generate(request, [&](const v1::GenerateResponse::Tokens& tokens) {
                           TakeNumbers(tokens.ids(), &ids);
                           TakeNumbers(tokens.log_probs(), &log_probs);
                           text += tokens.text();
                           if (!flags.json) {
                             std::cout << (has_text ? tokens.text() : absl::StrCat(ids.back(), " "))
                                       << std::flush;
                           }
                           return absl::OkStatus();
                         }));
  if (!flags.sink_mass.empty()) {
    std::vector<float> mass;
    TakeNumbers(summary.sink_mass(), &mass);
    EDUBA_RETURN_IF_ERROR(WriteSinkMass(flags.sink_mass, model, mass));
  }
  if (flags.json) {
    PrintJson({{"tokens", ids},
               {"log_probs", log_probs},
               {"text", text},
               {"finish_reason", FinishText(summary.finish_reason())},
               {"prompt_tokens", prompt_tokens},
               {"length", summary.length()},
               {"seconds", summary.seconds()}});
  } else {
    std::cout << std::endl;
  }
  if (summary.finish_reason() == v1::FINISH_REASON_DEADLINE) {
    return absl::DeadlineExceededError(
        absl::StrCat("the time is over after ", summary.tokens(), " of ", flags.max_tokens,
                     " tokens; they are in the session, which has ", summary.length(),
                     " tokens now: generate again to go on, or give more --timeout"));
  }
  return absl::OkStatus();
}

// --- score ---

struct ScoreFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string tokens;
  std::string out;
  std::string sink_mass;
};

void AddScoreOptions(CLI::App& command, ScoreFlags& flags) {
  command.add_option("NAME", flags.name, "The session, which stays as it is")->required();
  command.add_option("--tokens", flags.tokens, "ids.npy: integers [tokens], that might come next")
      ->required();
  command.add_option("--out", flags.out, "logprobs.npy to write: f32 [tokens], natural")->required();
  command.add_option("--sink-mass", flags.sink_mass, kSinkMassHelp);
  AddServerFlags(command, flags.server);
  AddJsonFlag(command, flags.json);
}

absl::Status RunScore(const ScoreFlags& flags) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ReadTokenIds(flags.tokens));
  const auto client = Connect(flags.server);
  std::vector<float> mass;
  EDUBA_ASSIGN_OR_RETURN(const std::vector<float> log_probs,
                         client->Score(flags.name, ids, flags.sink_mass.empty() ? nullptr : &mass));
  EDUBA_RETURN_IF_ERROR(
      WriteNpy(flags.out, {static_cast<int64_t>(log_probs.size())}, absl::MakeConstSpan(log_probs)));
  if (!flags.sink_mass.empty()) {
    EDUBA_ASSIGN_OR_RETURN(const v1::Model model, client->GetModel());
    EDUBA_RETURN_IF_ERROR(WriteSinkMass(flags.sink_mass, model, mass));
  }
  double sum = 0;
  for (const float log_prob : log_probs) sum += log_prob;
  if (flags.json) {
    PrintJson({{"tokens", ids.size()}, {"log_prob", sum}, {"out", flags.out}});
  } else {
    std::cout << absl::StrFormat("%d tokens, log-probability %.6g, %.6g a token", ids.size(), sum,
                                 sum / static_cast<double>(ids.size()))
              << std::endl;
  }
  return absl::OkStatus();
}

// --- embed ---

struct EmbedFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string ranges;
  std::string pool = "mean";
  std::string out;
};

void AddEmbedOptions(CLI::App& command, EmbedFlags& flags) {
  command.add_option("NAME", flags.name, "The session, which stays as it is")->required();
  command.add_option("--ranges", flags.ranges, "r.npy: int64 [ranges, 2], ascending positions [begin, end)")
      ->required();
  command
      .add_option("--pool", flags.pool,
                  "Of a range's hidden states; c2s, Cell2Sentence's own, is their mean (docs/models.md)")
      ->check(CLI::IsMember({"mean", "last", "c2s"}))
      ->capture_default_str();
  command.add_option("--out", flags.out, "e.npy to write: f32 [ranges, hidden_size]")->required();
  AddServerFlags(command, flags.server);
  AddJsonFlag(command, flags.json);
}

absl::Status RunEmbed(const EmbedFlags& flags) {
  EDUBA_ASSIGN_OR_RETURN(const auto file, NpyFile::Open(flags.ranges));
  EDUBA_RETURN_IF_ERROR(file->Expect({NpyType::kI64}, {-1, 2}, "[ranges, 2]"));
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int64_t> ranges, file->ReadAll<int64_t>());
  EDUBA_ASSIGN_OR_RETURN(
      const std::vector<float> vectors,
      Connect(flags.server)->Embed(flags.name, ranges, flags.pool == "last" ? v1::POOL_LAST : v1::POOL_MEAN));
  const auto rows = static_cast<int64_t>(ranges.size() / 2);
  const int64_t width = static_cast<int64_t>(vectors.size()) / rows;
  EDUBA_RETURN_IF_ERROR(WriteNpy(flags.out, {rows, width}, absl::MakeConstSpan(vectors)));
  if (flags.json) {
    PrintJson({{"ranges", rows}, {"hidden_size", width}, {"out", flags.out}});
  } else {
    std::cout << absl::StrFormat("%d ranges, %d numbers each", rows, width) << std::endl;
  }
  return absl::OkStatus();
}

// --- model show ---

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

// --- model list ---

// Of all files in it.
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
  AddCommand(app, "generate", "Let the model go on behind a session's tokens", chosen, AddGenerateOptions,
             RunGenerate);
  AddCommand(app, "score", "Log-probabilities of tokens behind a session's", chosen, AddScoreOptions,
             RunScore);
  AddCommand(app, "embed", "Pooled hidden states of ranges of a session", chosen, AddEmbedOptions, RunEmbed);
  CLI::App* model =
      app.add_subcommand("model", "Models that come with the program, and the one that the workers hold");
  model->require_subcommand(1);
  AddCommand(*model, "list", "What can be served by name, and what the server holds", chosen, AddShowOptions,
             RunList);
  AddCommand(*model, "show", "Show the one that the workers hold", chosen, AddShowOptions, RunShow);
}

}  // namespace eduba
