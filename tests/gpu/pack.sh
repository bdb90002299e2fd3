#!/usr/bin/env bash
# Builds and packs what tests/gpu/run.sh runs, for a machine that has a GPU and neither compilers nor our libraries: the release programs, the shared
# libraries that they need beyond those of C and C++, and the model nano. The other machine's C library must be as new as this one's.
#   tests/gpu/pack.sh OUT.tar.xz
#   there: mkdir built && python3 -m tarfile -e OUT.tar.xz built && tests/gpu/run.sh --built built
set -euo pipefail
if (($# != 1)); then
  sed -n '2,5p' "$0" | sed 's/^# \?//' >&2
  exit 2
fi
out=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/gpu/programs.sh
command -v patchelf >/dev/null || {
  echo "pack: patchelf is not installed; apt-get install patchelf" >&2
  exit 1
}
build_programs

# What a C++ program finds everywhere, and newer there than here.
everywhere='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|stdc\+\+|gcc_s))\.so'
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
mkdir -p "$packed"/{bin,lib,share/eduba/models}
for program in "${programs[@]}"; do
  built=build/release/bin/$program
  [[ $program == eduba ]] && built=build/release/eduba
  while read -r library path; do
    [[ $library =~ $everywhere ]] || cp -nL "$path" "$packed/lib/$library"
  done < <(ldd "$built" | awk '$2 == "=>" { print $1, $3 }')
  strip -o "$packed/bin/$program" "$built"
  # RPATH, not RUNPATH: it holds for what the libraries need, and nothing in LD_LIBRARY_PATH comes before it.
  patchelf --force-rpath --set-rpath '$ORIGIN/../lib' "$packed/bin/$program"
done
# A RUNPATH of theirs would switch off the program's RPATH.
for library in "$packed"/lib/*; do patchelf --remove-rpath "$library"; done
cp -rL model/nano/weights "$packed/share/eduba/models/nano"
{
  git rev-parse HEAD
  [[ -z $(git status --porcelain) ]] || echo "with changes that are not committed"
} | paste -sd ' ' >"$packed/commit"

# The programs side by side: the kernels that several of them hold are packed once.
tar -C "$packed" --owner=0 --group=0 --sort=name -cf - bin commit lib share | xz -9 -T1 >"$out"
echo "pack: ${#programs[@]} programs, $(find "$packed/lib" -type f | wc -l) libraries: $(du -m "$out" | cut -f1) MiB in $1"
