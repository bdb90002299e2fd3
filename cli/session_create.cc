// eduba session create.

#include <optional>
#include <string>
#include <vector>

#include "CLI/Error.hpp"
#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/dtype.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/session_commands.h"
#include "cli/session_text.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

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
          "Token id that the server puts at the first --sink-tokens positions, before the first append; or "
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
    ReportSession(session, options.json);
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
  ReportSession(session, options.json);
  return absl::OkStatus();
}

}  // namespace

void AddCreateCommand(CLI::App& session, Command& chosen) {
  AddCommand(session, "create", "Create an empty session", chosen, AddCreateOptions, RunCreate);
}

}  // namespace eduba
