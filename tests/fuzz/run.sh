#!/usr/bin/env bash
# Runs every fuzz target for some seconds, from its corpus.
#   tests/fuzz/run.sh BIN_DIR SECONDS [SEED]     with a seed the same inputs in every run, as many as fit into the time
set -euo pipefail
bin=$(cd "$1" && pwd)
seconds=$2
seed=${3:-0}  # libFuzzer's 0: a new one each time.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

targets=("$bin"/*_fuzz)
[[ -x ${targets[0]} ]] || {
  echo "fuzz: no target in $bin; build the preset 'fuzz' first" >&2
  exit 1
}
for target in "${targets[@]}"; do
  name=$(basename "$target")
  work=$(mktemp -d)
  corpus=()
  [[ -d $here/corpus/$name ]] && corpus=("$here/corpus/$name")
  echo "fuzz: $name for $seconds s"
  # New inputs go to the first folder, so the repository's corpus stays as it is.
  if ! "$target" -seed="$seed" -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=10 -print_final_stats=0 -verbosity=0 \
    -artifact_prefix="$work/" "$work" "${corpus[@]}" >"$work/log" 2>&1; then
    tail -n 40 "$work/log" >&2
    echo "fuzz: $name failed; the input is in $work" >&2
    exit 1
  fi
  rm -rf "$work"
done
