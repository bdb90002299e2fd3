// eduba score.

#include <iostream>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_commands.h"
#include "cli/output.h"
#include "cli/sink_mass.h"
#include "cli/tokens.h"
#include "ingest/npy.h"

namespace eduba {
namespace {

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
  AddSinkMassOption(command, flags.sink_mass);
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

}  // namespace

void AddScoreCommand(CLI::App& app, Command& chosen) {
  AddCommand(app, "score", "Log-probabilities of tokens after a session's", chosen, AddScoreOptions,
             RunScore);
}

}  // namespace eduba
