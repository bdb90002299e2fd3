#!/usr/bin/env bash
# Installs what is missing, builds, and runs the tests. From any directory, as often as you like.
#   tests/run.sh           what CI runs: style, release, and the core under ASan+UBSan and TSan
#   tests/run.sh --full    also every fast test under ASan+UBSan, a short fuzz, clang-tidy
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
# The tests of one preset; a preset that runs no test has failed. Tests with real processes and deadlines share two cores with whatever
# else runs, so one that fails is run once more, and the log shows both.
run_tests() {
  ctest --preset "$1" --no-tests=error --repeat until-pass:2 "${@:2}"
}

say "What is needed"
deploy/setup.sh --test

say "Release build"
cmake --preset release >build.log.tmp 2>&1 || {
  cat build.log.tmp >&2
  exit 1
}
rm -f build.log.tmp
cmake --build --preset release -j "$jobs"

say "Style and structure"
/usr/bin/python3 tests/tidy_test.py

say "Release tests"
run_tests release -LE slow

if [[ $quick == yes ]]; then
  say "Passed (quick)"
  exit 0
fi

# The core, where our own threads and memory meet. Not what lives inside gRPC's threads: Debian's gRPC is not instrumented.
core=(base_test page_store_test rows_test staged_append_test sharded_attention_test engine_test)
for preset in dev tsan; do
  say "Sanitizers: $preset"
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset" -j "$jobs" --target "${core[@]}"
  run_tests "$preset" -R "^($(
    IFS='|'
    echo "${core[*]}"
  ))$"
done

if [[ $full == yes ]]; then
  say "Sanitizers: all fast tests"
  cmake --build --preset dev -j "$jobs"
  run_tests dev -L 'unit|contract|cluster' -LE slow
  say "Fuzzing, briefly"
  cmake --preset fuzz >/dev/null
  cmake --build --preset fuzz -j "$jobs"
  tests/fuzz/run.sh build/fuzz/bin 20
  say "Clang-tidy"
  tests/clang_tidy.sh
fi

say "Passed"
