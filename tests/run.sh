#!/usr/bin/env bash
# Installs what is missing, builds, and runs the tests. From any directory, as often as you like.
#   tests/run.sh           what CI runs: style, release, the fast tests under ASan+UBSan, those with threads of ours under TSan, a short fuzz
#   tests/run.sh --full    a minute of new fuzzing for each target, and clang-tidy
#   tests/run.sh --quick   the release build and its tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=no
full=no
case ${1:-} in
  "") ;;
  --quick) quick=yes ;;
  --full) full=yes ;;
  *)
    sed -n '2,5p' "$0" | sed 's/^# \?//' >&2
    exit 2
    ;;
esac

jobs=$(nproc)
began=$SECONDS
say() { printf '\n== [%d:%02d] %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*"; }
# The end, with what this machine could not test.
passed() {
  say "Passed$1"
  [[ -z $without_cuda ]] || echo "SKIPPED, NOT TESTED: CUDA code was not compiled: $without_cuda"
}
# The tests of one preset; a preset that runs no test has failed.
run_tests() {
  ctest --preset "$1" --no-tests=error -j "$jobs" "${@:2}"
}

say "What is needed"
deploy/setup.sh --test

say "Release build"
cmake --preset release -DEDUBA_WERROR=ON -DEDUBA_CUDA_WGMMA=ON >build.log.tmp 2>&1 || {
  cat build.log.tmp >&2
  exit 1
}
without_cuda=$(sed -n 's/^-- CUDA: \(not .*\)/\1/p' build.log.tmp)
rm -f build.log.tmp
cmake --build --preset release -j "$jobs"

say "Style and structure"
/usr/bin/python3 tests/tidy_test.py

say "Locks, checked by clang"
/usr/bin/python3 tests/thread_safety.py

say "Release tests"
run_tests release -LE slow

if [[ $quick == yes ]]; then
  passed " (quick)"
  exit 0
fi

say "Sanitizers: dev"
cmake --preset dev >/dev/null
cmake --build --preset dev -j "$jobs"
run_tests dev -L 'unit|contract|cluster|golden' -LE slow

# Where our own threads meet. Not what lives inside gRPC's: Debian's gRPC is not instrumented, and its hand-overs look like races.
threaded=(base_test id_log_test page_store_test staged_append_test sharded_attention_test command_loop_test model_sessions_test local_communicator_test
  gloo_communicator_test nccl_communicator_test communicator_contract_test
  job_loop_test sequence_parallel_prefill_test)
say "Sanitizers: tsan"
cmake --preset tsan >/dev/null
cmake --build --preset tsan -j "$jobs" --target "${threaded[@]}"
run_tests tsan -R "^($(
  IFS='|'
  echo "${threaded[*]}"
))$"

say "Fuzzing"
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz -j "$jobs" --target fuzz_targets
if [[ $full == no ]]; then
  tests/fuzz/run.sh build/fuzz/bin 10 1
else
  tests/fuzz/run.sh build/fuzz/bin 60
  say "Clang-tidy"
  tests/clang_tidy.sh
fi

passed ""
