// eduba session create|append|show|list|delete. (attend has a file of its own.)

#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "CLI/Error.hpp"
#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "base/dtype.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_text.h"
#include "cli/npy_rows.h"
#include "cli/output.h"
#include "cli/session_attend.h"
#include "cli/session_cells.h"
#include "cli/tokens.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

std::string DTypeText(v1::DType dtype) {
  const auto known = DTypeFromProto(dtype);
  return known.ok() ? DTypeName(*known) : "?";
}

Json SessionJson(const v1::Session& session) {
  const v1::SessionSpec& spec = session.spec();
  Json json = {
      {"name", session.name()},
      {"length", session.length()},
      {"bytes", session.bytes()},
      {"lost", session.lost()},
      {"created_unix_ms", session.created_unix_ms()},
      {"layers", spec.layers()},
      {"query_heads", spec.query_heads()},
      {"kv_heads", spec.kv_heads()},
      {"head_dim", spec.head_dim()},
      {"value_dim", spec.value_dim()},
      {"dtype", DTypeText(spec.dtype())},
      {"sink_tokens", spec.sink_tokens()},
      {"sink_logits", std::vector<float>(spec.sink_logits().begin(), spec.sink_logits().end())},
      {"window", spec.window()},
      {"scale", spec.scale()},
      {"softcap", spec.softcap()},
      {"stripe_pages", spec.stripe_pages()},
  };
  if (spec.has_model()) {
    json["sink_tokens"] = spec.model().sink_tokens();
    json["window"] = spec.model().window();
    json["model"] = absl::StrFormat("%016x", spec.model().model_hash());
    json["policy"] = PolicyText(spec.model());
    json["positions"] = PositionsText(spec.model());
    json["sink_token"] = DedicatedSinks(spec) > 0 ? Json(spec.model().sink_token()) : Json();
  }
  return json;
}

void PrintSession(const v1::Session& session) {
  const v1::SessionSpec& spec = session.spec();
  std::vector<std::vector<std::string>> rows = {
      {"session", session.name()},
      {"length", absl::StrCat(session.length(), " positions, ", BytesText(session.bytes()))},
      {"heads", absl::StrFormat("%d query, %d kv, head_dim %d, value_dim %d", spec.query_heads(),
                                spec.kv_heads(), spec.head_dim(), spec.value_dim())},
      {"layers", absl::StrCat(spec.layers())},
      {"dtype", DTypeText(spec.dtype())},
      {"sinks", absl::StrCat(spec.sink_tokens(), " tokens, learned ",
                             spec.sink_logits().empty() ? "none" : absl::StrJoin(spec.sink_logits(), " "))},
      {"window", spec.window() > 0 ? absl::StrCat(spec.window(), " positions") : "none"},
      {"logits", absl::StrFormat("scale %g%s", spec.scale(),
                                 spec.softcap() > 0 ? absl::StrFormat(", softcap %g", spec.softcap()) : "")},
      {"stripes", absl::StrCat(spec.stripe_pages(), " pages")},
      {"created", absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", absl::FromUnixMillis(session.created_unix_ms()),
                                   absl::UTCTimeZone())},
  };
  if (spec.has_model()) {
    rows.push_back({"model", ModelSpecText(spec.model())});
    if (const int64_t sinks = DedicatedSinks(spec); sinks > 0) {
      rows.push_back(
          {"own sinks", absl::StrFormat("positions 0 to %d are token %d, put in ahead of the first append",
                                        sinks - 1, spec.model().sink_token())});
    }
  }
  if (session.lost()) {
    rows.push_back({"lost", "its content went with a worker; delete it and append again"});
  }
  PrintTable(rows);
}

void Report(const v1::Session& session, bool json) {
  if (json) {
    PrintJson(SessionJson(session));
  } else {
    PrintSession(session);
  }
}

// --- create ---

struct CreateOptions {
  ServerFlags server;
  bool json = false;
  std::string name;
  int layers = 1;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int value_dim = 0;
  std::string dtype = "f32";
  std::optional<int64_t> sink_tokens;
  std::vector<float> sink_logits;
  int64_t window = 0;
  std::optional<float> scale;
  float softcap = 0;
  int stripe_pages = 0;
  bool model = false;
  std::string policy;
  std::string positions;
  int64_t clamp = 0;
  std::string sink_token;
};

void AddCreateOptions(CLI::App& command, CreateOptions& options) {
  command.add_option("NAME", options.name, "Name of the new session: 1 to 128 of A-Z a-z 0-9 . _ -")
      ->required();
  auto* model = command.add_flag("--model", options.model,
                                 "A session of the workers' model: token ids instead of keys and values");
  command
      .add_option(
          "--policy", options.policy,
          "With --model, what rows see: the model's own layers; sinks and window (streaming); those while "
          "appending, all when asked (star) [what the model's folder says, else model]")
      ->check(CLI::IsMember({"model", "streaming", "star"}))
      ->needs(model);
  command
      .add_option(
          "--positions", options.positions,
          "With --policy streaming, rotary positions of the sinks [what the model's folder says, else "
          "absolute]")
      ->check(CLI::IsMember({"absolute", "rolling", "clamped"}))
      ->needs(model);
  command
      .add_option(
          "--sink-token", options.sink_token,
          "Token id that the server puts at the first --sink-tokens positions, ahead of the first append; or "
          "none [what the model's folder says, else none]")
      ->check([](const std::string& text) {
        int32_t id = 0;
        return text == "none" || (absl::SimpleAtoi(text, &id) && id >= 0)
                   ? ""
                   : "'" + text + "' is no token id, nor none";
      })
      ->needs(model);
  command
      .add_option("--clamp", options.clamp, "With --positions clamped, the largest [the last trained for]")
      ->needs(model);
  const std::vector<CLI::Option*> heads = {
      command.add_option("--query-heads", options.query_heads, "Query heads, a multiple of --kv-heads"),
      command.add_option("--kv-heads", options.kv_heads, "Key and value heads"),
      command.add_option("--head-dim", options.head_dim, "Elements of a key, 1 to 1024")};
  for (CLI::Option* option : heads) option->excludes(model);
  command.parse_complete_callback([heads, model] {
    for (const CLI::Option* option : heads) {
      if (model->empty() && option->empty()) throw CLI::RequiredError(option->get_name());
    }
  });
  command.add_option("--value-dim", options.value_dim, "Elements of a value, 1 to 1024 [--head-dim]");
  command.add_option("--layers", options.layers, "Layers; arrays then have a leading layer axis")
      ->capture_default_str();
  command.add_option("--dtype", options.dtype, "How keys and values are stored")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  command.add_option(
      "--sink-tokens", options.sink_tokens,
      "The first positions, replicated on every worker [0; with --model what its folder says, else 4]");
  command
      .add_option("--sink-logit", options.sink_logits,
                  "Learned sink: a logit in the denominator only; one value, or one per query head (A,B,...)")
      ->delimiter(',')
      ->allow_extra_args(false);
  command.add_option("--window", options.window,
                     "Last positions that 'attend --policy window', or a streaming or star model session "
                     "sees [none; with --model "
                     "what its folder says]");
  command.add_option("--scale", options.scale, "logit = scale * (q . k) [1/sqrt(head_dim)]");
  command.add_option("--softcap", options.softcap, "logit = softcap * tanh(scale * (q . k) / softcap)");
  command.add_option("--stripe-pages", options.stripe_pages,
                     "Pages of 256 positions that are placed together [64]");
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

v1::SessionSpec ModelSessionSpec(const CreateOptions& options) {
  v1::SessionSpec spec;
  spec.set_stripe_pages(options.stripe_pages);
  v1::ModelSpec* model = spec.mutable_model();
  model->set_policy(options.policy == "streaming" ? v1::MODEL_POLICY_STREAMING
                    : options.policy == "star"    ? v1::MODEL_POLICY_STAR
                    : options.policy == "model"   ? v1::MODEL_POLICY_MODEL
                                                  : v1::MODEL_POLICY_UNSPECIFIED);
  model->set_positions(options.positions == "rolling"    ? v1::POSITION_MODE_ROLLING
                       : options.positions == "clamped"  ? v1::POSITION_MODE_CLAMPED
                       : options.positions == "absolute" ? v1::POSITION_MODE_ABSOLUTE
                                                         : v1::POSITION_MODE_UNSPECIFIED);
  if (int32_t id = -1; options.sink_token == "none" || absl::SimpleAtoi(options.sink_token, &id)) {
    model->set_sink_token(id);
  }
  model->set_window(options.window);
  model->set_clamp(options.clamp);
  if (options.sink_tokens) model->set_sink_tokens(*options.sink_tokens);
  return spec;
}

absl::Status RunCreate(const CreateOptions& options) {
  if (options.model) {
    EDUBA_ASSIGN_OR_RETURN(const v1::Session session,
                           Connect(options.server)->CreateSession(options.name, ModelSessionSpec(options)));
    Report(session, options.json);
    return absl::OkStatus();
  }
  v1::SessionSpec spec;
  spec.set_layers(options.layers);
  spec.set_query_heads(options.query_heads);
  spec.set_kv_heads(options.kv_heads);
  spec.set_head_dim(options.head_dim);
  spec.set_value_dim(options.value_dim);
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, ParseDType(options.dtype));
  spec.set_dtype(DTypeToProto(dtype));
  spec.set_sink_tokens(options.sink_tokens.value_or(0));
  spec.mutable_sink_logits()->Assign(options.sink_logits.begin(), options.sink_logits.end());
  spec.set_window(options.window);
  if (options.scale) spec.set_scale(*options.scale);
  spec.set_softcap(options.softcap);
  spec.set_stripe_pages(options.stripe_pages);
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session,
                         Connect(options.server)->CreateSession(options.name, spec));
  Report(session, options.json);
  return absl::OkStatus();
}

// --- append ---

struct AppendFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string keys;
  std::string values;
  TokenFlags tokens;
  CellFlags cells;
  std::optional<int64_t> at;
  bool thin = false;
};

void AddAppendOptions(CLI::App& command, AppendFlags& options) {
  command.add_option("NAME", options.name, "The session")->required();
  auto* keys = command.add_option(
      "--keys", options.keys,
      "k.npy: f32 or f16 [tokens, kv_heads, head_dim], with a leading layer axis when there are layers");
  auto* values =
      command
          .add_option("--values", options.values, "v.npy: f32 or f16 [tokens, kv_heads, value_dim], likewise")
          ->needs(keys);
  keys->needs(values);
  auto* tokens = command
                     .add_option("--tokens", options.tokens.ids_path,
                                 "ids.npy: integers [tokens], for a session of the workers' model")
                     ->excludes(keys);
  auto* text = command.add_option("--text", options.tokens.text_path, "Text file, UTF-8, likewise")
                   ->excludes(keys)
                   ->excludes(tokens);
  auto* cells =
      command
          .add_option("--cells", options.cells.path,
                      "cells.h5ad, likewise: each cell's expressed genes, the most expressed first; as "
                      "tokens, or for a model that reads text as names")
          ->excludes(keys)
          ->excludes(tokens)
          ->excludes(text);
  command
      .add_option("--rows", options.cells.sentences.rows,
                  "With --cells, rows.npy: which cells, in this order [all]")
      ->needs(cells);
  command
      .add_option("--matrix", options.cells.sentences.matrix,
                  "With --cells, what genes are ranked by: X or layers/NAME")
      ->needs(cells)
      ->capture_default_str();
  command
      .add_option(
          "--genes", options.cells.sentences.genes,
          "With --cells, var/NAME with the genes' names [var/feature_name, or the index of var without it]")
      ->needs(cells);
  command
      .add_option("--top-genes", options.cells.top_genes,
                  "With --cells, the most expressed genes of a cell only [all]")
      ->needs(cells)
      ->check(CLI::Range(int64_t{1}, kMaxPositions));
  command
      .add_option("--ranges-out", options.cells.ranges_out,
                  "With --cells, r.npy to write: int64 [cells, 2], where each cell is, for 'embed --ranges'")
      ->needs(cells);
  auto* tokenizer = command.add_option("--tokenizer", options.tokens.tokenizer,
                                       "With --text or --cells, folder of the tokenizer [the model's]");
  command.parse_complete_callback([keys, tokens, text, cells, tokenizer] {
    if (keys->empty() && tokens->empty() && text->empty() && cells->empty()) {
      throw CLI::RequiredError("--keys and --values, or --tokens, or --text, or --cells,");
    }
    if (!tokenizer->empty() && text->empty() && cells->empty()) {
      throw CLI::RequiresError("--tokenizer", "--text or --cells");
    }
  });
  command.add_option(
      "--at", options.at,
      "Position where the append starts [the end]; makes a repetition of the same append safe");
  command.add_flag("--thin", options.thin, "Send through the coordinator, where workers cannot be reached");
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

absl::Status AppendModelTokens(Client& client, const AppendFlags& options) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.GetSession(options.name));
  const bool at_beginning = options.at.value_or(session.length()) <= DedicatedSinks(session.spec());
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ReadTokens(client, options.tokens, at_beginning));
  v1::AppendTokensReceipt receipt;
  const absl::Time started = absl::Now();
  {
    ProgressReport progress("append");
    const AppendOptions append = {options.at,
                                  [&](int64_t done, int64_t total) { progress.Rows(done, total); }};
    EDUBA_ASSIGN_OR_RETURN(receipt, client.AppendTokens(options.name, ids, append));
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - started);
  if (options.json) {
    PrintJson({{"at", receipt.at()},
               {"count", receipt.count()},
               {"length", receipt.length()},
               {"already_stored", receipt.already_stored()},
               {"seconds", seconds}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat("appended %d tokens at %d in %.3f s, %d of which were there; length %d",
                               receipt.count(), receipt.at(), seconds, receipt.already_stored(),
                               receipt.length())
            << std::endl;
  return absl::OkStatus();
}

absl::Status RunAppend(const AppendFlags& options) {
  const auto client = Connect(options.server);
  if (options.tokens.any()) return AppendModelTokens(*client, options);
  if (!options.cells.path.empty()) {
    return AppendCells(*client, options.name, options.cells, options.tokens.tokenizer, options.at,
                       options.json);
  }
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client->GetSession(options.name));
  EDUBA_ASSIGN_OR_RETURN(const auto rows, NpyRows::Open(options.keys, options.values, session.spec()));
  v1::AppendReceipt receipt;
  const absl::Time started = absl::Now();
  {
    ProgressReport progress("append");
    const AppendOptions append = {options.at,
                                  [&](int64_t done, int64_t total) { progress.Bytes(done, total); }};
    EDUBA_ASSIGN_OR_RETURN(receipt, options.thin ? client->AppendThin(session, rows->tokens(), *rows, append)
                                                 : client->Append(session, rows->tokens(), *rows, append));
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - started);
  const std::string digest = absl::StrFormat("%016x%016x", receipt.digest_high(), receipt.digest_low());
  if (options.json) {
    PrintJson({{"at", receipt.at()},
               {"count", receipt.count()},
               {"length", receipt.length()},
               {"already_stored", receipt.already_stored()},
               {"digest", digest},
               {"seconds", seconds}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat("%s %d positions at %d in %.3f s; length %d, digest %s",
                               receipt.already_stored() ? "had already" : "appended", receipt.count(),
                               receipt.at(), seconds, receipt.length(), digest)
            << std::endl;
  return absl::OkStatus();
}

// --- show, list, delete ---

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
  Report(session, options.json);
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
  Report(session, options.json);
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
  AddCommand(*session, "create", "Create an empty session", chosen, AddCreateOptions, RunCreate);
  AddCommand(*session, "append", "Append keys and values, or a model's tokens, from files", chosen,
             AddAppendOptions, RunAppend);
  AddCommand(*session, "fork", "A new session with the same tokens, on the same memory", chosen,
             AddForkOptions, RunFork);
  AddAttendCommand(*session, chosen);
  AddCommand(*session, "show", "Show one session", chosen, AddNameOptions, RunShow);
  AddCommand(*session, "list", "List all sessions", chosen, AddListOptions, RunList);
  AddCommand(*session, "delete", "Delete a session and free its memory", chosen, AddNameOptions, RunDelete);
}

}  // namespace eduba
