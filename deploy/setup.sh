#!/usr/bin/env bash
# Installs what building and running Eduba needs on Debian 12, and nothing that is there already.
#   deploy/setup.sh           to build and run
#   deploy/setup.sh --test    also what the tests need
set -euo pipefail

packages=(
  # The tools
  cmake ninja-build g++ pkg-config ccache protobuf-compiler protobuf-compiler-grpc
  # The libraries (docs/adr/0001-dependencies.md says why each)
  libgrpc++-dev libprotobuf-dev libabsl-dev libdnnl-dev libhwy-dev libgloo-dev libhdf5-dev libsqlite3-dev
  nlohmann-json3-dev libcli11-dev libxxhash-dev libpcre2-dev libicu-dev libsentencepiece-dev libgtest-dev libgmock-dev libbenchmark-dev
  # The demo and the end-to-end tests
  python3 python3-numpy python3-h5py python3-scipy python3-sklearn python3-grpcio python3-protobuf python3-pip
)
if [[ ${1:-} == --test ]]; then
  packages+=(clang clang-format clang-tidy libclang-rt-14-dev git)
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [[ $status == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "setup: everything is installed"
  exit 0
fi

echo "setup: installing ${#missing[@]} packages: ${missing[*]}"
as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || {
    echo "setup: installing packages needs root; run as root or install: ${missing[*]}" >&2
    exit 1
  }
  as_root=(sudo)
fi
log=$(mktemp)
if ! { "${as_root[@]}" apt-get update &&
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
  >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "setup: apt-get failed (above); mend it and run this again" >&2
  exit 1
fi
rm -f "$log"
echo "setup: done"
