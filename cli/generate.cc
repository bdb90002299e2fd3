// eduba generate.

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include "CLI/Option.hpp"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/model_commands.h"
#include "cli/output.h"
#include "cli/sink_mass.h"
#include "cli/tokens.h"
#include "model/sampler.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

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
  command.add_flag("--ignore-eos", flags.ignore_eos, "Go on after the model's end-of-text tokens");
  AddSinkMassOption(command, flags.sink_mass);
  AddServerFlags(command, flags.server);
  AddJsonFlag(command, flags.json);
}

std::string FinishText(v1::FinishReason reason) {
  if (reason == v1::FINISH_REASON_STOP) return "stop";
  return reason == v1::FINISH_REASON_DEADLINE ? "deadline" : "length";
}

v1::GenerateRequest RequestOf(const GenerateFlags& flags, const v1::Model& model) {
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
  return request;
}

// Appends the prompt, if there is one, and says how many tokens it has.
absl::StatusOr<int64_t> AppendPrompt(Client& client, const GenerateFlags& flags) {
  if (!flags.prompt.any()) return 0;
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.GetSession(flags.name));
  const int64_t sinks = DedicatedSinks(session.spec());
  EDUBA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                         ReadTokens(client, flags.prompt, session.length() <= sinks));
  AppendOptions append;
  append.at = std::max(session.length(), sinks);
  EDUBA_RETURN_IF_ERROR(client.AppendTokens(flags.name, ids, append).status());
  return static_cast<int64_t>(ids.size());
}

// Adds the numbers of a message to those that came before.
template <typename T>
absl::Status AppendNumbers(const std::string& bytes, const char* what, std::vector<T>& numbers) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<T> some, NumbersOf<T>(bytes, what));
  numbers.insert(numbers.end(), some.begin(), some.end());
  return absl::OkStatus();
}

absl::Status RunGenerate(const GenerateFlags& flags) {
  const auto client = Connect(flags.server);
  EDUBA_ASSIGN_OR_RETURN(const v1::Model model, client->GetModel());
  const v1::GenerateRequest request = RequestOf(flags, model);
  // The server would find the same, but only after it has appended the prompt, which would stay.
  EDUBA_RETURN_IF_ERROR(CheckGenerateRequest(request, model));
  EDUBA_RETURN_IF_ERROR(
      CheckSampling({flags.temperature, flags.top_k, flags.top_p == 0 ? 1 : flags.top_p, flags.seed}));
  EDUBA_ASSIGN_OR_RETURN(const int64_t prompt_tokens, AppendPrompt(*client, flags));
  const bool has_text = !model.tokenizer().empty();
  std::vector<int32_t> ids;
  std::vector<float> log_probs;
  std::string text;
  EDUBA_ASSIGN_OR_RETURN(
      const v1::GenerateSummary summary,
      client->Generate(request, [&](const v1::GenerateResponse::Tokens& tokens) {
        EDUBA_RETURN_IF_ERROR(AppendNumbers(tokens.ids(), "token ids", ids));
        EDUBA_RETURN_IF_ERROR(AppendNumbers(tokens.log_probs(), "log-probabilities", log_probs));
        text += tokens.text();
        if (!flags.json) {
          std::cout << (has_text ? tokens.text() : absl::StrCat(ids.back(), " ")) << std::flush;
        }
        return absl::OkStatus();
      }));
  if (!flags.sink_mass.empty()) {
    EDUBA_ASSIGN_OR_RETURN(const std::vector<float> mass, NumbersOf<float>(summary.sink_mass(), "sink mass"));
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

}  // namespace

void AddGenerateCommand(CLI::App& app, Command& chosen) {
  AddCommand(app, "generate", "Let the model go on after a session's tokens", chosen, AddGenerateOptions,
             RunGenerate);
}

}  // namespace eduba
