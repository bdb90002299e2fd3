#!/usr/bin/env bash
# Runs clang-tidy over our sources, as the release build compiles them. A file that reads the same after the preprocessor, comments and
# all, since its last clean run with the same checks, in any checkout, is not looked at again: the user's cache folder keeps one stamp a file.
#   tests/clang_tidy.sh [FILE...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($#)); then
  files=("$@")
else
  mapfile -t files < <(git ls-files '*.cc' ':!tests/fuzz')
fi
export stamps=${XDG_CACHE_HOME:-$HOME/.cache}/eduba-tidy
mkdir -p "$stamps"
checks=$(cat <(clang-tidy --version) .clang-tidy | sha256sum | cut -c1-16)

# The file as clang reads it, with the arguments of the build.
preprocessed() {
  /usr/bin/python3 - "$1" <<'PY'
import json, os, shlex, subprocess, sys
path = os.path.abspath(sys.argv[1])
entries = json.load(open("build/release/compile_commands.json"))
folder = os.path.dirname(path)
# What stands in where CUDA is absent is not built where it is there: with the arguments of a neighbour then, as clang-tidy does.
entry = min(entries, key=lambda e: (e["file"] != path, os.path.dirname(e["file"]) != folder))
words = shlex.split(entry["command"])
words = words[next(i for i, word in enumerate(words) if word.startswith("-")):]
words = words[: words.index("-o")] + [path]
sys.exit(subprocess.run(["clang++", "-w", *words, "-E", "-C", "-P"], cwd=entry["directory"]).returncode)
PY
}
check() {
  local key
  key=$(preprocessed "$1" | sha256sum) || return 1
  key=$stamps/${key:0:32}-$2
  [[ -e $key ]] && return 0
  if clang-tidy -p build/release --quiet "$1" 2>/dev/null; then
    touch "$key"
  else
    echo "clang-tidy: $1 has findings (above)"
    return 1
  fi
}
export -f preprocessed check
export SHELLOPTS
printf '%s\0' "${files[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c 'check "$1" "$2"' _ {} "$checks"
echo "clang-tidy: ${#files[@]} files clean"
