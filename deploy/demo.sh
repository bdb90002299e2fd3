#!/usr/bin/env bash
# Installs what is missing, builds, annotates a real cell atlas, and lets a model read another one: about a minute after the
# build on two cores.
#   deploy/demo.sh             everything
#   deploy/demo.sh --cells N   with N synthetic cells in the scale part instead of 1,000,000
#   deploy/demo.sh --whole     the model reads all 2.02 million genes of its atlas, not the first 999 of each cell: minutes more
# From any directory, as often as you like. What it fetches and writes is kept in build/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cells=1000000
whole=()
while (($#)); do
  if [[ $1 == --cells && ${2:-} =~ ^[0-9]+$ ]]; then
    cells=$2
    shift 2
  elif [[ $1 == --whole ]]; then
    whole=(--whole)
    shift
  else
    sed -n '2,7p' "$0" | sed 's/^# \?//' >&2
    exit 2
  fi
done

began=$SECONDS
say() { printf '\n== [%d:%02d] %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*"; }
work=$PWD/build/demo
mkdir -p "$work"

say "What is needed"
deploy/setup.sh

say "Release build"
cmake --preset release >"$work/configure.log" 2>&1 || {
  cat "$work/configure.log" >&2
  exit 1
}
cmake --build --preset release --target eduba -j "$(nproc)"

# The atlas: 700 cells of the 10x PBMC 68k data, in the scanpy package (BSD-3). The package is unpacked, not installed.
atlas=$work/10x_pbmc68k_reduced.h5ad
sum=e71d41e737c941559b7c57c9243bdb3d2c889c2adfdf00e3422ac6b46783676f
is_atlas() { [[ -f $1 ]] && echo "$sum  $1" | sha256sum --check --status; }
if ! is_atlas "$atlas"; then
  say "Fetching the atlas"
  rm -rf "$work/fetch"
  /usr/bin/python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/fetch" scanpy==1.9.8
  /usr/bin/python3 -m zipfile -e "$work"/fetch/scanpy-*.whl "$work/fetch"
  mv "$work/fetch/scanpy/datasets/10x_pbmc68k_reduced.h5ad" "$atlas"
  rm -rf "$work/fetch"
  is_atlas "$atlas" || {
    echo "demo: $atlas is not the file that was wanted (sha256 $sum); remove it and try again" >&2
    exit 1
  }
fi

# The second atlas: HSMM, in Debian's r-bioc-hsmmsinglecell (Artistic-2.0). Unpacked, not installed.
course=$work/hsmm.h5ad
if [[ ! -f $course ]]; then
  say "Fetching the time course"
  rm -rf "$work/fetch"
  mkdir -p "$work/fetch"
  (cd "$work/fetch" && apt-get download r-bioc-hsmmsinglecell >apt.log 2>&1 && dpkg -x r-bioc-hsmmsinglecell_*.deb .) || {
    cat "$work/fetch/apt.log" >&2
    echo "demo: r-bioc-hsmmsinglecell cannot be fetched (above); apt-get update may help" >&2
    exit 1
  }
  /usr/bin/python3 deploy/demo/hsmm.py "$work/fetch/usr/lib/R/site-library/HSMMSingleCell/data" "$course"
  rm -rf "$work/fetch"
fi

say "The main job"
# In the place of this shell, so that a signal reaches the one who stops the service.
exec /usr/bin/python3 deploy/demo/demo.py --eduba build/release/eduba --atlas "$atlas" --work "$work" --cells "$cells" \
  --time-course "$course" "${whole[@]}"
