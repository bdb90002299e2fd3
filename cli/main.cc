// The program `eduba`.
#include "cli/program.h"

int main(int argc, char** argv) { return eduba::RunProgram(argc, argv); }
