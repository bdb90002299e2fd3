// eduba session append.

#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "CLI/Error.hpp"
#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/npy_rows.h"
#include "cli/output.h"
#include "cli/session_cells.h"
#include "cli/session_commands.h"
#include "cli/tokens.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

struct AppendFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string keys;
  std::string values;
  TokenFlags tokens;
  CellFlags cells;
  std::optional<int64_t> at;
  bool proxied = false;
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
  command.add_flag("--proxied,--thin", options.proxied,
                   "Send through the coordinator, where workers cannot be reached");
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
    EDUBA_ASSIGN_OR_RETURN(receipt, options.proxied
                                        ? client->AppendProxied(session, rows->tokens(), *rows, append)
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

}  // namespace

void AddAppendCommand(CLI::App& session, Command& chosen) {
  AddCommand(session, "append", "Append keys and values, or a model's tokens, from files", chosen,
             AddAppendOptions, RunAppend);
}

}  // namespace eduba
