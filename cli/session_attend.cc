#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "CLI/Error.hpp"
#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/flags.h"
#include "cli/output.h"
#include "cli/session_commands.h"
#include "ingest/npy.h"

namespace eduba {
namespace {

struct AttendFlags {
  ServerFlags server;
  bool json = false;
  std::string name;
  std::string queries;
  std::string positions;
  std::string out;
  std::string lse;
  std::string sink_mass;
  std::string policy = "global";
  int layer = 0;
};

// One file cannot hold two results.
void CheckResultsDiffer(const AttendFlags& flags) {
  std::map<std::filesystem::path, std::string> options;
  const std::pair<std::string, std::string> results[] = {
      {"--out", flags.out}, {"--lse", flags.lse}, {"--sink-mass", flags.sink_mass}};
  for (const auto& [option, path] : results) {
    if (path.empty()) continue;
    std::error_code error;  // A path that cannot be followed is refused where it is opened.
    const auto [entry, added] = options.emplace(
        std::filesystem::weakly_canonical(std::filesystem::absolute(path, error), error), option);
    if (!added) {
      throw CLI::ValidationError(
          option, "is the same file as " + entry->second + " ('" + path + "'); name another file");
    }
  }
}

void AddOptions(CLI::App& command, AttendFlags& options) {
  command.parse_complete_callback([&options] { CheckResultsDiffer(options); });
  command.add_option("NAME", options.name, "The session")->required();
  command.add_option("--queries", options.queries, "q.npy: f32 [rows, query_heads, head_dim]")->required();
  command.add_option("--out", options.out, "o.npy to write: f32 [rows, query_heads, value_dim]")->required();
  command.add_option("--lse", options.lse, "l.npy to write: f32 [rows, query_heads], log of the denominator");
  command.add_option("--sink-mass", options.sink_mass,
                     "m.npy to write: f32 [rows, query_heads], the sinks' share of the denominator");
  command.add_option("--policy", options.policy, "Which keys a row sees")
      ->check(CLI::IsMember({"global", "window"}))
      ->capture_default_str();
  command.add_option("--positions", options.positions,
                     "p.npy: int64 or int32 [rows]; row r sees positions <= p[r] [the whole sequence]");
  command.add_option("--layer", options.layer, "Layer that is asked")->capture_default_str();
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

// The rows' queries and positions, read as they are sent.
class NpyQueries {
 public:
  static absl::StatusOr<NpyQueries> Open(const AttendFlags& flags, const v1::SessionSpec& spec) {
    NpyQueries result;
    EDUBA_ASSIGN_OR_RETURN(result.queries_, NpyFile::Open(flags.queries));
    EDUBA_RETURN_IF_ERROR(result.queries_->Expect({NpyType::kF32}, {-1, spec.query_heads(), spec.head_dim()},
                                                  "[rows, query_heads, head_dim]"));
    result.row_elements_ = int64_t{spec.query_heads()} * spec.head_dim();
    if (result.rows() == 0) {
      return absl::InvalidArgumentError(absl::StrCat(flags.queries, " has no rows; ask at least one"));
    }
    if (!flags.positions.empty()) {
      EDUBA_ASSIGN_OR_RETURN(result.positions_, NpyFile::Open(flags.positions));
      EDUBA_RETURN_IF_ERROR(
          result.positions_->Expect({NpyType::kI64, NpyType::kI32}, {result.rows()}, "[rows]"));
    }
    return result;
  }

  int64_t rows() const { return queries_->shape()[0]; }
  bool has_positions() const { return positions_ != nullptr; }

  absl::Status Read(int64_t first, absl::Span<float> queries, absl::Span<int64_t> positions) const {
    EDUBA_RETURN_IF_ERROR(
        queries_->Read(first * row_elements_, static_cast<int64_t>(queries.size()), queries.data()));
    if (positions.empty()) return absl::OkStatus();
    const auto count = static_cast<int64_t>(positions.size());
    if (positions_->type() == NpyType::kI64) return positions_->Read(first, count, positions.data());
    std::vector<int32_t> narrow(positions.size());
    EDUBA_RETURN_IF_ERROR(positions_->Read(first, count, narrow.data()));
    std::copy(narrow.begin(), narrow.end(), positions.begin());
    return absl::OkStatus();
  }

 private:
  std::unique_ptr<NpyFile> queries_;
  std::unique_ptr<NpyFile> positions_;
  int64_t row_elements_ = 0;
};

// The files that were asked for; they appear together at the end, or not at all.
class NpyResults {
 public:
  static absl::StatusOr<NpyResults> Create(const AttendFlags& flags, const v1::SessionSpec& spec,
                                           int64_t rows) {
    NpyResults result;
    EDUBA_ASSIGN_OR_RETURN(result.outputs_, NpyWriter::Create(flags.out, NpyType::kF32,
                                                              {rows, spec.query_heads(), spec.value_dim()}));
    if (!flags.lse.empty()) {
      EDUBA_ASSIGN_OR_RETURN(result.lse_,
                             NpyWriter::Create(flags.lse, NpyType::kF32, {rows, spec.query_heads()}));
    }
    if (!flags.sink_mass.empty()) {
      EDUBA_ASSIGN_OR_RETURN(result.sink_mass_,
                             NpyWriter::Create(flags.sink_mass, NpyType::kF32, {rows, spec.query_heads()}));
    }
    return result;
  }

  absl::Status Append(const AnsweredRows& rows) {
    EDUBA_RETURN_IF_ERROR(outputs_->Append(rows.outputs));
    if (lse_) EDUBA_RETURN_IF_ERROR(lse_->Append(rows.lse));
    if (sink_mass_) EDUBA_RETURN_IF_ERROR(sink_mass_->Append(rows.sink_mass));
    return absl::OkStatus();
  }

  absl::Status Finish() {
    EDUBA_RETURN_IF_ERROR(outputs_->Finish());
    if (lse_) EDUBA_RETURN_IF_ERROR(lse_->Finish());
    if (sink_mass_) EDUBA_RETURN_IF_ERROR(sink_mass_->Finish());
    return absl::OkStatus();
  }

 private:
  std::unique_ptr<NpyWriter> outputs_;
  std::unique_ptr<NpyWriter> lse_;
  std::unique_ptr<NpyWriter> sink_mass_;
};

void Report(const v1::AttendSummary& summary, bool json) {
  if (json) {
    PrintJson({{"rows", summary.rows()},
               {"seconds", summary.seconds()},
               {"workers", summary.workers()},
               {"collectives", summary.collectives()},
               {"path", {{"sink", summary.row_heads_sink()}, {"max", summary.row_heads_maximum()}}},
               {"bytes_read", summary.bytes_read()},
               {"length", summary.length()}});
    return;
  }
  std::cout
      << absl::StrFormat(
             "%d rows against %d positions in %.3f s: %d workers, %d collectives, %s read; row-heads by "
             "path: sink %d, max %d",
             summary.rows(), summary.length(), summary.seconds(), summary.workers(), summary.collectives(),
             BytesText(summary.bytes_read()), summary.row_heads_sink(), summary.row_heads_maximum())
      << std::endl;
}

absl::Status Run(const AttendFlags& flags) {
  const auto client = Connect(flags.server);
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client->GetSession(flags.name));
  EDUBA_ASSIGN_OR_RETURN(const NpyQueries queries, NpyQueries::Open(flags, session.spec()));
  EDUBA_ASSIGN_OR_RETURN(NpyResults results, NpyResults::Create(flags, session.spec(), queries.rows()));

  AttendOptions options;
  options.layer = flags.layer;
  options.policy = flags.policy == "window" ? v1::POLICY_WINDOW : v1::POLICY_GLOBAL;
  options.positions = queries.has_positions();
  v1::AttendSummary summary;
  {
    ProgressReport progress("attend");
    EDUBA_ASSIGN_OR_RETURN(summary,
                           client->Attend(
                               session, queries.rows(),
                               [&](int64_t first, absl::Span<float> out, absl::Span<int64_t> positions) {
                                 return queries.Read(first, out, positions);
                               },
                               [&](const AnsweredRows& rows) {
                                 progress.Rows(rows.first_row + rows.count, queries.rows());
                                 return results.Append(rows);
                               },
                               options));
  }
  EDUBA_RETURN_IF_ERROR(results.Finish());
  Report(summary, flags.json);
  return absl::OkStatus();
}

}  // namespace

void AddAttendCommand(CLI::App& session, Command& chosen) {
  AddCommand(session, "attend", "Ask queries from an .npy file", chosen, AddOptions, Run);
}

}  // namespace eduba
