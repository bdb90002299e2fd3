#!/usr/bin/env bash
# Runs clang-tidy over our sources, as the release build compiles them. A file whose text, headers of ours and checks are unchanged since
# its last clean run, in any checkout, is not looked at again: the user's cache folder keeps one stamp a file.
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
# Any header or check that changes invalidates all stamps: simple, and never stale.
common=$(git ls-files -z '*.h' '*.proto' .clang-tidy | xargs -0 sha256sum | sha256sum | cut -c1-16)

check() {
  local stamp
  stamp=$stamps/$(sha256sum <"$1" | cut -c1-32)-$2
  [[ -e $stamp ]] && return 0
  if clang-tidy -p build/release --quiet "$1" 2>/dev/null; then
    touch "$stamp"
  else
    echo "clang-tidy: $1 has findings (above)"
    return 1
  fi
}
export -f check
printf '%s\0' "${files[@]}" | xargs -0 -P "$(nproc)" -I{} bash -c 'check "$1" "$2"' _ {} "$common"
echo "clang-tidy: ${#files[@]} files clean"
