#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: contract tests, benchmarks, workers that share the GPU and are killed, compute-sanitizer,
# profiles; what tells most comes first. Writes a report, the whole logs of all steps, and the figures as JSON. Ends with 1 when anything failed; with
# 2 where there is no GPU, after it has said of every step that it was skipped.
#   tests/gpu/run.sh [OPTION...]
#     --built DIR       runs the programs of an unpacked tests/gpu/pack.sh instead of building
#     --out DIR         where the report goes [benchmarks/results]
#     --budget SECONDS  for all: a step gets what is left, and is skipped where that is less than it is expected to take
#     --only PATTERN    the steps whose names match the regular expression
#     --quick           without compute-sanitizer and profiles
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/gpu/programs.sh

usage() {
  sed -n '2,10p' "$0" | sed 's/^# \?//' >&2
  exit 2
}
quick=no
built=
out=benchmarks/results
budget=
only=.
while (($# > 0)); do
  [[ $1 == --quick || $# -gt 1 ]] || usage
  case $1 in
    --quick) quick=yes ;;
    --built) built=$2 ;;
    --out) out=$2 ;;
    --budget) budget=$2 ;;
    --only) only=$2 ;;
    *) usage ;;
  esac
  [[ $1 == --quick ]] || shift
  shift
done
[[ $budget =~ ^[0-9]*$ ]] || usage

gpu=no
command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L) == *GPU* ]] && gpu=yes
programs_in=build/release/bin
eduba=build/release/eduba
if [[ -n $built ]]; then
  [[ -x $built/bin/eduba ]] || {
    echo "gpu/run: $built/bin/eduba is not there; wanted the folder that an archive of tests/gpu/pack.sh was unpacked to" >&2
    exit 2
  }
  built=$(realpath "$built")
  programs_in=$built/bin
  eduba=$built/bin/eduba
fi
scratch=$(mktemp -d)
[[ $gpu == yes ]] || out=$scratch
mkdir -p "$out"
report=$(realpath "$out")/gpu-$(date -u +%Y%m%d-%H%M%S).md
logs=${report%.md}.log
: >"$logs"
passed=0
failed=0
timed_out=0
skipped=0
lines_skipped=0
left_out=0
current=
group=

# NCCL and cuBLAS, where they came with a Python package: after what the user names, and nothing else of these folders, so that profilers find
# their own of the rest.
mkdir "$scratch/libraries"
while read -r library; do ln -sf "$library" "$scratch/libraries/"; done < <(
  python3 - <<'PY'
import glob
import sys

for folder in sys.path:
    for name in ("nccl", "cublas", "nvrtc"):
        for library in glob.glob(f"{folder}/nvidia/*/lib/lib{name}*.so*"):
            print(library)
PY
)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$scratch/libraries

# Whether a process of the group is left, other than dead ones that nobody has waited for.
runs() {
  # No pipe: a process that ends while its entry is read is no failure.
  awk -v group="$1" '{ sub(/.*\) /, "") } $3 == group && $1 !~ /[ZX]/ { found = 1 } END { exit !found }' < <(cat /proc/[0-9]*/stat 2>/dev/null)
}

# end_group GROUP: all that a step has started ends, and with it what it holds of the GPU's memory.
end_group() {
  local signal
  for signal in TERM KILL; do
    for ((wait = 0; wait < 50; ++wait)); do
      runs "$1" || return 0
      ((wait > 0)) || kill "-$signal" -- "-$1" 2>/dev/null
      sleep 0.1
    done
  done
  echo "gpu/run: processes of step '$current' do not end" | tee -a "$report" >&2
}

# Also where the run itself is ended early.
finish() {
  local code=$?
  trap - EXIT
  if [[ -n $group ]]; then
    printf '\n## %s: FAILED: the run was ended in it\n' "$current" >>"$report"
    failed=$((failed + 1))
    end_group "$group"
  fi
  if [[ $gpu == no ]]; then
    echo "gpu/run: no GPU on this machine (nvidia-smi lists none): $skipped steps SKIPPED, NOT TESTED; nothing was tested" >&2
    code=2
  else
    # What was skipped within steps that ran, too.
    local summary="$passed steps passed, $failed failed ($timed_out of them timed out), $skipped were skipped, $left_out left out by --only; "
    summary+="$((lines_skipped + skipped)) SKIPPED, NOT TESTED, tests within steps included"
    printf '\n## Summary\n%s\n' "$summary" >>"$report"
    echo "gpu/run: $summary; report: $report, whole logs: $logs"
    ((failed == 0)) || ((code != 0)) || code=1
  fi
  rm -rf "$scratch"
  exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT HUP

# skip NAME WHY: says that a step was not run, here and in the report.
skip() {
  printf 'SKIPPED, NOT TESTED: %s: %s\n' "$1" "$2" | tee -a "$report"
  skipped=$((skipped + 1))
}

# step NAME EXPECTED COMMAND...: runs it in a process group of its own, for three times as many seconds as expected at most, and puts its result and
# its last lines into the report. A command that ends with 3 has nothing to test on this machine, and says in its last line why.
step() {
  current=$1
  local limit=$((3 * $2)) expected=$2 code result began=$SECONDS over=no
  shift 2
  if [[ ! $current =~ $only ]]; then
    left_out=$((left_out + 1))
    return
  fi
  if [[ $gpu == no ]]; then
    skip "$current" "no GPU on this machine"
    return
  fi
  if [[ -n $budget ]]; then
    if ((budget - SECONDS < expected)); then
      skip "$current" "of --budget $budget, $((budget > SECONDS ? budget - SECONDS : 0)) s are left, it may take $expected"
      return
    fi
    ((limit <= budget - SECONDS)) || limit=$((budget - SECONDS))
  fi
  printf '== %s\n' "$current"
  printf '=== %s\n' "$current" >>"$logs"
  local start=$(($(stat -c %s "$logs") + 1))
  set -m
  ("$@") </dev/null >>"$logs" 2>&1 &
  group=$!
  set +m
  while kill -0 "$group" 2>/dev/null; do
    if ((SECONDS - began >= limit)); then
      over=yes
      break
    fi
    sleep 0.1
  done
  end_group "$group"
  wait "$group" 2>/dev/null
  code=$?
  group=
  tail -c "+$start" "$logs" >"$scratch/log"
  local skips
  skips=$(grep -c 'SKIPPED, NOT TESTED' "$scratch/log")
  if [[ $over == no && $code == 3 ]]; then
    skip "$current" "$(tail -n 1 "$scratch/log" | sed 's/^SKIPPED, NOT TESTED: //')"
    return
  fi
  lines_skipped=$((lines_skipped + skips))
  if [[ $over == yes ]]; then
    result="FAILED: timed out after $limit s"
    timed_out=$((timed_out + 1))
  elif ((code == 0)); then
    result=passed
  else
    result="FAILED with $code"
  fi
  result+=" ($((SECONDS - began)) s, $skips lines say SKIPPED, NOT TESTED)"
  if [[ $over == no && $code == 0 ]]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    { tail -n 40 "$scratch/log"; echo "$current: $result"; } >&2
  fi
  { printf '\n## %s: %s\n```\n' "$current" "$result"; tail -n "${lines:-25}" "$scratch/log"; printf '```\n'; } >>"$report"
}

# Several ranks on one GPU: another host for each, as NCCL believes, and sockets between them. Functional only: they take turns.
share_gpu() {
  export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_IB_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_MAX_CTAS=1
  export NCCL_CUMEM_ENABLE=0 NCCL_RAS_ENABLE=0 NCCL_SOCKET_RETRY_CNT=10 NCCL_SOCKET_RETRY_SLEEP_MSEC=50
  "$@"
}

# ready FILE PID: the address that a server has written there; it may load libraries for a while first.
ready() {
  for ((wait = 0; wait < 600; ++wait)); do
    sed -n 's/^ready: //p' "$1" | grep . && return 0
    kill -0 "$2" 2>/dev/null || break
    sleep 0.1
  done
  echo "no server came up: $(tail -n 5 "$1")" >&2
  return 1
}

# nccl_group SIZE: a group sums for a while; then the last rank is killed, and every other must end with an error, within its deadline
# and one second. Then a new group, the next epoch, must work.
nccl_group() {
  local size=$1 seconds=15 epoch
  for epoch in 1 2; do
    local directory=$scratch/group-$size-$epoch pids=()
    mkdir "$directory"
    for ((r = 0; r < size; ++r)); do
      NCCL_HOSTID=eduba-$epoch-$r "$programs_in/communicator_rank" "$directory" "$r" "$size" 4160 "$seconds" nccl >"$directory/out-$r" 2>"$directory/err-$r" &
      pids+=($!)
    done
    # Until all have summed twenty times.
    for ((r = 0; r < size; ++r)); do
      for ((wait = 0; wait < 600; ++wait)); do
        grep -q '^round 19$' "$directory/out-$r" 2>/dev/null && break
        grep -q '^end' "$directory/out-$r" 2>/dev/null && break
        sleep 0.1
      done
      grep -q '^round 19$' "$directory/out-$r" || {
        echo "epoch $epoch: rank $r of $size did not sum: $(tail -n 2 "$directory/out-$r" "$directory/err-$r")"
        return 1
      }
    done
    kill -KILL "${pids[size - 1]}"
    for ((r = 0; r < size - 1; ++r)); do
      wait "${pids[r]}"
      local code=$?
      echo "epoch $epoch: rank $r of $size: exit $code, $(tail -n 1 "$directory/out-$r")"
      # 137 is a stuck abort: allowed by design, and to be seen in the report.
      ((code == 0 || code == 137)) || return 1
      ((code == 137)) && continue
      local late
      late=$(awk '$1 == "end" { print $3 }' "$directory/out-$r")
      [[ -n $late ]] && ((late <= 1000)) || return 1
    done
  done
}

# Half of the heads take the sink path, the others the maximum path; every worker has pages.
sinks=(--sink-logit 4,4,4,4,0,0,0,0 --stripe-pages 3)

# workers_of TRANSPORT COUNT FAULT: coordinator and workers on cuda:0; an answer, the end of a worker, a new worker, the same answer. The fault is
# `kill`, or `gpu`: a write to an illegal address, by which the worker's GPU fails it (eduba_faulty, tests/faults/faulty_main.cc).
workers_of() {
  local transport=$1 count=$2 fault=$3 directory=$scratch/workers-$1-$2-$3 pids=() last=$eduba
  [[ $fault == kill ]] || last=$programs_in/eduba_faulty
  mkdir "$directory"
  numbers && cpu_answer || return 1
  "$eduba" coordinator --listen 127.0.0.1:0 --group-size "$count" --transport "$transport" >"$directory/coordinator" 2>&1 &
  local address
  address=$(ready "$directory/coordinator" $!) || return 1
  # start_worker NUMBER PROGRAM
  start_worker() {
    NCCL_HOSTID=eduba-worker-$1 "$2" worker --coordinator "$address" --listen 127.0.0.1:0 --device cuda:0 --transport "$transport" \
      --memory-bytes 1GiB >"$directory/worker-$1" 2>&1 &
    pids+=($!)
  }
  active() {
    local why="no answer in time" pid
    for ((wait = 0; wait < 200; ++wait)); do
      for pid in "${pids[@]}"; do
        kill -0 "$pid" 2>/dev/null && continue
        why="a worker ended"
        break 2
      done
      "$eduba" workers --server "$address" --json 2>/dev/null |
        python3 -c 'import json, sys; sys.exit(json.load(sys.stdin)["state"] != "active")' 2>/dev/null && return 0
      sleep 0.1
    done
    echo "the group did not form: $why"
    tail -n 3 "$directory"/*
    return 1
  }
  answer() {
    "$eduba" session create "$1" --server "$address" --query-heads 8 --kv-heads 2 --head-dim 64 --dtype bf16 --sink-tokens 4 "${sinks[@]}" &&
      "$eduba" session append "$1" --server "$address" --keys "$scratch/k.npy" --values "$scratch/v.npy" &&
      "$eduba" session attend "$1" --server "$address" --queries "$scratch/q.npy" --out "$directory/$1.npy"
  }
  for ((w = 0; w < count - 1; ++w)); do start_worker "$w" "$eduba"; done
  start_worker "$w" "$last"
  active && answer before || return 1
  cmp "$directory/before.npy" "$scratch/cpu.npy" || return 1
  if [[ $fault == kill ]]; then
    kill -KILL "${pids[count - 1]}"
  else
    kill -USR1 "${pids[count - 1]}"
    wait "${pids[count - 1]}"
    local code=$?
    tail -n 1 "$directory/worker-$((count - 1))"
    ((code == 1)) && grep -q 'this worker has left its group' "$directory/worker-$((count - 1))" || {
      echo "the worker whose GPU failed ended with $code, wanted 1 and that it has left its group"
      return 1
    }
  fi
  unset "pids[count - 1]"
  "$eduba" session attend before --server "$address" --queries "$scratch/q.npy" --out "$directory/none.npy" --timeout 30 && {
    echo "an answer came from a group that had lost a worker"
    return 1
  }
  start_worker "$count" "$eduba"
  sleep 2
  active && answer after || return 1
  cmp "$directory/after.npy" "$scratch/cpu.npy" || return 1
  echo "$count workers over $transport: the CPU's bytes before and after the fault"
}

# The keys, values, queries and token ids of the steps with workers.
numbers() {
  [[ -f $scratch/ids.npy ]] || python3 - "$scratch" <<'PY'
import array
import random
import struct
import sys

random.seed(1)

def write(name, kind, shape, numbers):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    with open(f"{sys.argv[1]}/{name}.npy", "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        numbers.tofile(file)

for name, shape in (("k", (20_000, 2, 64)), ("v", (20_000, 2, 64)), ("q", (16, 8, 64))):
    write(name, "<f4", shape, array.array("f", (random.gauss(0, 1) for _ in range(shape[0] * shape[1] * shape[2]))))
write("ids", "<i4", (700,), array.array("i", (random.randrange(4000) for _ in range(700))))
PY
}

# The answer that every group must give: the CPU's.
cpu_answer() {
  [[ -f $scratch/cpu.npy ]] && return
  "$eduba" up --workers 1 --listen 127.0.0.1:0 --memory-bytes 1GiB >"$scratch/up" 2>&1 &
  local pid=$! address
  address=$(ready "$scratch/up" "$pid") &&
    "$eduba" session create cpu --server "$address" --query-heads 8 --kv-heads 2 --head-dim 64 --dtype bf16 --sink-tokens 4 "${sinks[@]}" &&
    "$eduba" session append cpu --server "$address" --keys "$scratch/k.npy" --values "$scratch/v.npy" &&
    "$eduba" session attend cpu --server "$address" --queries "$scratch/q.npy" --out "$scratch/cpu.npy"
  local code=$?
  kill "$pid"
  wait "$pid"
  return "$code"
}

# on_gpu PROGRAM FILTER: not a test may be skipped here for want of a GPU.
on_gpu() {
  "$programs_in/$1" --gtest_filter="$2" | tee "$scratch/on_gpu" || return 1
  ! grep -qE 'SKIPPED, NOT TESTED: (cuda|nccl)' "$scratch/on_gpu"
}

# model_on_gpu ACTIVATIONS: nano on cuda:0, on one worker and on two: the same text and log-probs.
model_on_gpu() {
  local workers
  numbers || return 1
  for workers in 1 2; do
    local directory=$scratch/model-$1-$workers address
    mkdir "$directory"
    "$eduba" up --workers "$workers" --device cuda:0 --model nano --activations "$1" --listen 127.0.0.1:0 --memory-bytes 1GiB \
      >"$directory/up" 2>&1 &
    local pid=$!
    address=$(ready "$directory/up" "$pid") || return 1
    "$eduba" workers --server "$address"
    "$eduba" session create cell --server "$address" --model &&
      "$eduba" session append cell --server "$address" --tokens "$scratch/ids.npy" &&
      "$eduba" score cell --server "$address" --tokens "$scratch/ids.npy" --out "$directory/log_probs.npy" &&
      "$eduba" generate cell --server "$address" --max-tokens 50 >"$directory/text" || return 1
    kill "$pid"
    wait "$pid"
  done
  cmp "$scratch/model-$1-1/log_probs.npy" "$scratch/model-$1-2/log_probs.npy" &&
    cmp "$scratch/model-$1-1/text" "$scratch/model-$1-2/text"
}

# bench_attend PRECISION BYTES: keys and values of at most so many GiB, as far as they fit. The figures go beside the report, a table into it.
bench_attend() {
  local free json=${report%.md}-attend-$1-$2GiB.json
  free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | head -n 1)
  "$eduba" bench attend --device cuda:0 --precision "$1" --bytes "$((free > 1280 * $2 ? 1024 * $2 : free / 2))MiB" --json >"$json" &&
    python3 tests/gpu/attend_table.py "$json" "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)"
}

# where_it_works WHY COMMAND...: a tool that prints a line matching the pattern WHY cannot work on this machine, whatever it ends with.
where_it_works() {
  local why=$1 log=$scratch/tool
  shift
  command -v "$1" >/dev/null || {
    echo "SKIPPED, NOT TESTED: $1 is not installed (it comes with the CUDA toolkit)"
    return 3
  }
  "$@" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  if grep -qE "$why" "$log"; then
    echo "SKIPPED, NOT TESTED: $1 does not work here: $(grep -m 1 -E "$why" "$log")"
    return 3
  fi
  return "$code"
}

# sanitizer TOOL PROGRAM FILTER
sanitizer() {
  where_it_works 'Device not supported' compute-sanitizer --tool "$1" --error-exitcode 9 "$programs_in/$2" --gtest_filter="$3"
}

# profile PRECISION KERNELS BYTES: what the kernels are bound by, for whoever finds a figure missed. Of the shapes of that size, after those of
# 8 Ki keys, which take nine launches: three each, of which the last is the timed one. In a file beside the report.
profile() {
  local file=${report%.md}-profile-$1.txt
  where_it_works 'ERR_NVGPUCTRPERM|LibraryNotLoaded' ncu --set full --clock-control none --kernel-name "regex:$2" --launch-skip 9 --launch-count 6 \
    "$eduba" bench attend --device cuda:0 --precision "$1" --bytes "$3" --rounds 1 >"$file"
  local code=$?
  grep -E '^  [A-Za-z].*\(|Duration|Throughput |==ERROR==|SKIPPED' "$file"
  ((code == 0)) || return "$code"
  # ncu is content when no launch matched.
  grep -q Duration "$file" || {
    echo "no launch of $2 was profiled"
    return 1
  }
}

{
  printf '# Eduba on a GPU\n\n%s, commit %s\n\n```\n' "$(date -u +'%Y-%m-%d %H:%M UTC')" \
    "$(if [[ -n $built ]]; then cat "$built/commit"; else git rev-parse HEAD; fi)"
  [[ $gpu == no ]] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  printf '```\n'
} >"$report"

if [[ -z $built && $gpu == yes ]]; then
  only=. step "build" 600 build_programs
  # Nor are older programs tested in the place of those that had no time to be built.
  ((passed == 1)) || exit 1
fi
step "doctor" 5 "$eduba" doctor --timeout 1
step "contract of the exact kernels" 40 on_gpu backend_test '*/cuda:CudaBackend.*'
step "contract of the tensor kernels" 40 on_gpu backend_test '*/cuda_tensor'
for precision in exact tensor; do
  lines=60 step "bench attend, $precision" 40 bench_attend "$precision" 4
done
step "PyTorch's attention beside it" 40 python3 benchmarks/sdpa_gpu.py
step "contract of a model's layers" 20 on_gpu layer_kernels_test '*/cuda:*/cuda_bf16:CudaLayerKernels.*:CublasLt.*'
step "a model's layers" 10 on_gpu gpu_layers_test '*/cuda'
step "contract of the transports" 20 share_gpu "$programs_in/communicator_contract_test" --gtest_filter='*/nccl'
# But for the one whose library, an old NCCL that is emulated, stays with the build.
step "nccl's own tests" 10 share_gpu "$programs_in/nccl_communicator_test" --gtest_filter=-LoadNccl.WithoutTheLibrary*
# Ranks that share the GPU.
step "contract of the transports over processes" 150 on_gpu communicator_kill_test '*/nccl'
for activations in f32 bf16; do
  step "a model on the GPU, activations $activations" 20 model_on_gpu "$activations"
done
for size in 2 4; do
  step "$size ranks over NCCL, one killed" 30 share_gpu nccl_group "$size"
done
for transport in gloo nccl; do
  for count in 2 4; do
    step "$count workers over $transport on one GPU, one killed" 20 share_gpu workers_of "$transport" "$count" kill
  done
  step "2 workers over $transport, the GPU of one fails" 20 share_gpu workers_of "$transport" 2 gpu
done
if [[ $quick == no ]]; then
  for path in cuda cuda_tensor; do
    step "memcheck of $path" 40 sanitizer memcheck backend_test "*RandomProblems*/$path"
    step "racecheck of $path" 40 sanitizer racecheck backend_test "*ThreadsDoNotChange*/$path"
  done
  for tool in memcheck racecheck; do
    step "$tool of layers" 20 sanitizer "$tool" layer_kernels_test '*NormsMatch*/cuda:*RotationsMatch*/cuda:*ActivationsMatch*/cuda:*NotFinite*/cuda'
  done
  step "profile of the exact kernel" 30 profile exact AttendKernel 256MiB
  step "profile of the tensor kernel" 30 profile tensor 'TensorKernel|WarpgroupKernel' 128MiB
else
  skip "compute-sanitizer and profiles" "--quick"
fi
# The real payloads; NCCL where every rank can have a GPU of its own.
gpus=1
[[ $gpu == no ]] || gpus=$(nvidia-smi -L | grep -c GPU)
step "bench merge, $((gpus > 1 ? gpus : 2)) ranks" 10 "$eduba" bench merge --ranks "$((gpus > 1 ? gpus : 2))"
((gpus > 1)) || skip "NCCL's latency" "one GPU: ranks that share it take turns, which is no latency"
for precision in exact tensor; do
  lines=60 step "bench attend, $precision, to 4 Mi keys" 60 bench_attend "$precision" 16
done
