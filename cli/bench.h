#ifndef EDUBA_CLI_BENCH_H_
#define EDUBA_CLI_BENCH_H_

#include "CLI/App.hpp"
#include "cli/command.h"

namespace eduba {

// eduba bench ..., each in its own file.
void AddKernelBenches(CLI::App& bench, Command& chosen);  // stream, attend
void AddMergeBench(CLI::App& bench, Command& chosen);
void AddAppendBench(CLI::App& bench, Command& chosen);

}  // namespace eduba

#endif  // EDUBA_CLI_BENCH_H_
