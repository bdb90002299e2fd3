// eduba embed.

#include <iostream>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_commands.h"
#include "cli/output.h"
#include "ingest/npy.h"

namespace eduba {
namespace {

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

}  // namespace

void AddEmbedCommand(CLI::App& app, Command& chosen) {
  AddCommand(app, "embed", "Pooled hidden states of ranges of a session", chosen, AddEmbedOptions, RunEmbed);
}

}  // namespace eduba
