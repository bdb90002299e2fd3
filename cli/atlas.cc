// eduba atlas load|annotate: a reference of labelled cells as a session, and calls for other cells.
// atlas/atlas.h has the arithmetic.

#include <cmath>
#include <iostream>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "cli/atlas_cells.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "ingest/atomic_file.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// Rounding that moves cells by more of sigma than this deserves a word.
constexpr double kRoundingMax = 0.1;

// --- load ---

struct LoadOptions {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string file;
  std::string key;
  std::string label;
  std::string rows;
  std::string dtype = "bf16";
  int64_t window = 0;
};

void AddLoadOptions(CLI::App& command, LoadOptions& options) {
  command.add_option("NAME", options.name, "Name of the new session: 1 to 128 of A-Z a-z 0-9 . _ -")
      ->required();
  command.add_option("FILE", options.file, "The reference: an .h5ad file")->required();
  command.add_option("--key", options.key, "The cells' embedding: obsm/KEY, X or layers/NAME")->required();
  command.add_option("--label", options.label, "The cells' labels: obs/COLUMN")->required();
  command.add_option("--rows", options.rows, "LIST.npy: row numbers, or a boolean for each row [all cells]");
  command.add_option("--dtype", options.dtype, "How the reference is stored")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  command.add_option("--window", options.window, "Last cells that annotate --policy window sees");
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

// sigma, the sink's distance and the rest, from an even sample of the cells.
absl::StatusOr<Atlas> Fit(const LoadOptions& options, const AtlasCells& cells, const AtlasLabels& labels) {
  Atlas atlas;
  atlas.key = options.key;
  atlas.label_column = options.label;
  atlas.labels = labels.names;
  EDUBA_ASSIGN_OR_RETURN(atlas.dtype, ParseDType(options.dtype));
  const std::vector<int64_t> sample = SampleIndices(cells.size());
  std::vector<float> vectors(sample.size() * static_cast<size_t>(cells.dims()));
  EDUBA_RETURN_IF_ERROR(cells.ReadAt(sample, vectors.data()));
  std::vector<int32_t> codes;
  codes.reserve(sample.size());
  for (const int64_t index : sample) codes.push_back(labels.codes[static_cast<size_t>(index)]);
  auto fitted = FitAtlas(std::move(atlas), vectors, codes);
  if (!fitted.ok()) return Annotate(fitted.status(), options.file);
  const double rounding = RoundingInSigmas(*fitted, vectors);
  if (rounding > kRoundingMax) {
    LogWarning(absl::StrFormat("%s: storing as %s moves the cells by %.2f sigma; --dtype f32 would not",
                               options.file, options.dtype, rounding));
  }
  return fitted;
}

v1::SessionSpec SpecOf(const Atlas& atlas, int64_t window) {
  v1::SessionSpec spec;
  spec.set_layers(1);
  spec.set_query_heads(1);
  spec.set_kv_heads(1);
  spec.set_head_dim(static_cast<int32_t>(atlas.head_dim()));
  spec.set_value_dim(static_cast<int32_t>(atlas.value_dim()));
  spec.set_dtype(DTypeToProto(atlas.dtype));
  spec.add_sink_logits(atlas.sink_logit());
  spec.set_window(window);
  spec.set_scale(1);
  spec.set_notes(AtlasToJson(atlas));
  return spec;
}

absl::Status RunLoad(const LoadOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const AtlasCells cells, AtlasCells::Open(options.file, options.key, options.rows));
  EDUBA_ASSIGN_OR_RETURN(const CellLabels all_labels, cells.file().ReadLabels(options.label));
  const auto labels = ReferenceLabels(all_labels.names, all_labels.codes, cells.rows());
  if (!labels.ok()) return Annotate(labels.status(), absl::StrCat(options.file, ": ", options.label));
  EDUBA_ASSIGN_OR_RETURN(const Atlas atlas, Fit(options, cells, *labels));

  const auto client = Connect(options.server);
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session,
                         client->CreateSession(options.name, SpecOf(atlas, options.window)));
  const absl::Time started = absl::Now();
  absl::StatusOr<v1::AppendReceipt> receipt;
  {
    ProgressReport progress("load");
    AppendOptions append;
    append.at = 0;
    append.progress = [&](int64_t done, int64_t total) { progress.Bytes(done, total); };
    receipt = client->Append(session, cells.size(), AtlasRows(atlas, cells, labels->codes), append);
  }
  if (!receipt.ok()) {
    // The session is ours and of no use without its cells.
    const absl::Status deleted = client->DeleteSession(options.name);
    if (!deleted.ok()) {
      LogWarning(absl::StrCat("session ", options.name, " is left behind empty: ", deleted.ToString()));
    }
    return receipt.status();
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - started);
  if (options.json) {
    PrintJson({{"session", options.name},
               {"cells", cells.size()},
               {"dims", atlas.dims()},
               {"labels", atlas.labels},
               {"dtype", options.dtype},
               {"sigma", atlas.sigma},
               {"sink_distance", atlas.sink_distance},
               {"sink_logit", atlas.sink_logit()},
               {"digest", absl::StrFormat("%016x%016x", receipt->digest_high(), receipt->digest_low())},
               {"seconds", seconds}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat(
                   "loaded %d cells, %d dims, %d labels in %.3f s; sigma %.4g, sink distance %.4g",
                   cells.size(), atlas.dims(), atlas.value_dim(), seconds, atlas.sigma, atlas.sink_distance)
            << std::endl;
  return absl::OkStatus();
}

// --- annotate ---

struct AnnotateOptions {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string file;
  std::string out;
  std::string key;
  std::string rows;
  std::string policy = "global";
};

void AddAnnotateOptions(CLI::App& command, AnnotateOptions& options) {
  command.add_option("NAME", options.name, "The session of a loaded atlas")->required();
  command.add_option("FILE", options.file, "The cells to call: an .h5ad file")->required();
  command
      .add_option("--out", options.out,
                  "calls.csv to write: cell, label, probability, second_label, second_probability, novelty")
      ->required();
  command.add_option("--key", options.key, "The cells' embedding [where the reference had it]");
  command.add_option("--rows", options.rows, "LIST.npy: row numbers, or a boolean for each row [all cells]");
  command.add_option("--policy", options.policy, "Which reference cells are seen: all, or the last --window")
      ->check(CLI::IsMember({"global", "window"}))
      ->capture_default_str();
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

// The session's notes, checked against its shape: a session may have been created by hand.
absl::StatusOr<Atlas> AtlasOf(const v1::Session& session) {
  auto atlas = AtlasFromJson(session.spec().notes());
  if (!atlas.ok()) return Annotate(atlas.status(), absl::StrCat("session ", session.name()));
  if (session.spec().query_heads() != 1 || session.spec().head_dim() != atlas->head_dim() ||
      session.spec().value_dim() != atlas->value_dim()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "session ", session.name(), ": found notes of an atlas of another shape; load it again"));
  }
  return atlas;
}

absl::Status RunAnnotate(const AnnotateOptions& options) {
  const auto client = Connect(options.server);
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client->GetSession(options.name));
  EDUBA_ASSIGN_OR_RETURN(const Atlas atlas, AtlasOf(session));
  const std::string key = options.key.empty() ? atlas.key : options.key;
  EDUBA_ASSIGN_OR_RETURN(const AtlasCells cells, AtlasCells::Open(options.file, key, options.rows));
  if (cells.dims() != atlas.dims()) {
    return absl::InvalidArgumentError(absl::StrCat(options.file, ": ", key, ": found ", cells.dims(),
                                                   " columns, wanted ", atlas.dims(), " as the atlas has"));
  }
  EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<AtomicFile> out, AtomicFile::Create(options.out));
  EDUBA_RETURN_IF_ERROR(out->Write(CallsHeader()));

  // Queries are read on another thread than calls are written on.
  const QuerySource source = [&](int64_t first, absl::Span<float> queries,
                                 absl::Span<int64_t>) -> absl::Status {
    const int64_t count = static_cast<int64_t>(queries.size()) / atlas.head_dim();
    std::vector<float> vectors(static_cast<size_t>(count * atlas.dims()));
    EDUBA_RETURN_IF_ERROR(cells.Read(first, count, vectors.data()));
    EncodeQueries(atlas, vectors, queries);
    return absl::OkStatus();
  };
  int64_t novel = 0;
  AttendOptions attend;
  attend.policy = options.policy == "window" ? v1::POLICY_WINDOW : v1::POLICY_GLOBAL;
  v1::AttendSummary summary;
  {
    ProgressReport progress("annotate");
    const ResultSink sink = [&](const AnsweredRows& rows) -> absl::Status {
      EDUBA_ASSIGN_OR_RETURN(
          const std::vector<std::string> names,
          cells.file().ReadCellNames(absl::MakeConstSpan(cells.rows()).subspan(rows.first_row, rows.count)));
      std::string lines;
      for (size_t i = 0; i < names.size(); ++i) {
        const auto width = static_cast<size_t>(atlas.value_dim());
        const CellCall call = CallCell(rows.outputs.subspan(i * width, width), rows.sink_mass[i]);
        novel += call.novelty > 0.5 ? 1 : 0;
        lines += CallsLine(atlas, names[i], call);
      }
      progress.Rows(rows.first_row + rows.count, cells.size());
      return out->Write(lines);
    };
    EDUBA_ASSIGN_OR_RETURN(summary, client->Attend(session, cells.size(), source, sink, attend));
  }
  EDUBA_RETURN_IF_ERROR(out->Commit());
  if (options.json) {
    PrintJson({{"cells", summary.rows()},
               {"novel", novel},
               {"reference_cells", summary.length()},
               {"seconds", summary.seconds()},
               {"workers", summary.workers()},
               {"collectives", summary.collectives()},
               {"path", {{"sink", summary.row_heads_sink()}, {"max", summary.row_heads_maximum()}}},
               {"bytes_read", summary.bytes_read()}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat(
                   "called %d cells against %d in %.3f s on %d workers; %d are like nothing in the atlas "
                   "(novelty above 0.5)",
                   summary.rows(), summary.length(), summary.seconds(), summary.workers(), novel)
            << std::endl;
  return absl::OkStatus();
}

}  // namespace

void AddAtlasCommands(CLI::App& app, Command& chosen) {
  CLI::App* atlas =
      app.add_subcommand("atlas", "Load a reference of labelled cells, and call other cells from it");
  atlas->require_subcommand(1);
  AddCommand(*atlas, "load", "Load labelled cells of an .h5ad file as a session", chosen, AddLoadOptions,
             RunLoad);
  AddCommand(*atlas, "annotate", "Call the cells of an .h5ad file from a loaded atlas", chosen,
             AddAnnotateOptions, RunAnnotate);
}

}  // namespace eduba
