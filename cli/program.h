#ifndef EDUBA_CLI_PROGRAM_H_
#define EDUBA_CLI_PROGRAM_H_

namespace eduba {

// The whole program. Returns its exit code: 0 done, 1 failed, 2 bad usage.
int RunProgram(int argc, char** argv);

}  // namespace eduba

#endif  // EDUBA_CLI_PROGRAM_H_
