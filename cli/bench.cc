#include "cli/bench.h"

namespace eduba {

void AddBenchCommands(CLI::App& app, Command& chosen) {
  CLI::App* bench = app.add_subcommand("bench", "Measure this machine, each number beside its ceiling");
  bench->require_subcommand(1);
  AddKernelBenches(*bench, chosen);
  AddMergeBench(*bench, chosen);
  AddAppendBench(*bench, chosen);
}

}  // namespace eduba
