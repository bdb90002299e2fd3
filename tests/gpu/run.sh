#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: build, contract tests, compute-sanitizer, workers that share the GPU and are
# killed, benchmarks. Writes one report to benchmarks/results/. Ends with 1 when anything failed; with 2 where there is no GPU, after it has said
# of every step that it was skipped.
#   tests/gpu/run.sh           all of it
#   tests/gpu/run.sh --quick   without compute-sanitizer
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

quick=no
case ${1:-} in
  "") ;;
  --quick) quick=yes ;;
  *)
    sed -n '2,6p' "$0" | sed 's/^# \?//' >&2
    exit 2
    ;;
esac
gpu=yes
command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || gpu=no

build=build/release
eduba=$build/eduba
rank=$build/bin/communicator_rank
scratch=$(mktemp -d)
report=$scratch/report
if [[ $gpu == yes ]]; then
  mkdir -p benchmarks/results
  report=benchmarks/results/gpu-$(date -u +%Y%m%d-%H%M%S).md
fi
failed=0
skipped=0
started=()

cleanup() {
  for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null; done
  wait 2>/dev/null
  rm -rf "$scratch"
}
trap cleanup EXIT

# step NAME COMMAND...: runs it, and puts its result and its last lines into the report.
step() {
  local name=$1
  shift
  local log=$scratch/log began=$SECONDS
  if [[ $gpu == no ]]; then
    skip "$name" "no GPU on this machine"
    return
  fi
  printf '== %s\n' "$name"
  if "$@" >"$log" 2>&1; then
    printf '\n## %s: passed (%d s)\n' "$name" $((SECONDS - began)) >>"$report"
  else
    local code=$?
    printf '\n## %s: FAILED with %d (%d s)\n' "$name" "$code" $((SECONDS - began)) >>"$report"
    failed=$((failed + 1))
    tail -n 40 "$log" >&2
  fi
  { printf '```\n'; tail -n "${lines:-25}" "$log"; printf '```\n'; } >>"$report"
}

# skip NAME WHY: says that a step was not run, here and in the report.
skip() {
  printf 'SKIPPED, NOT TESTED: %s: %s\n' "$1" "$2" | tee -a "$report"
  skipped=$((skipped + 1))
}

# Several ranks on one GPU: another host for each, as NCCL believes, and sockets between them. Functional only: they take turns.
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_IB_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_MAX_CTAS=1
export NCCL_CUMEM_ENABLE=0 NCCL_RAS_ENABLE=0 NCCL_SOCKET_RETRY_CNT=10 NCCL_SOCKET_RETRY_SLEEP_MSEC=50

# nccl_group SIZE: a group sums for a while; then the last rank is killed, and every other must end with an error, within its deadline
# and one second. Then a new group, the next epoch, must work.
nccl_group() {
  local size=$1 seconds=30 epoch
  for epoch in 1 2; do
    local directory=$scratch/group-$size-$epoch pids=()
    mkdir "$directory"
    for ((r = 0; r < size; ++r)); do
      NCCL_HOSTID=eduba-$epoch-$r "$rank" "$directory" "$r" "$size" 4160 "$seconds" nccl >"$directory/out-$r" 2>"$directory/err-$r" &
      pids+=($!)
      started+=($!)
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

# workers_of TRANSPORT COUNT: coordinator and workers on cuda:0; an answer, a worker's SIGKILL, a new worker, the same answer.
workers_of() {
  local transport=$1 count=$2 directory=$scratch/workers-$1-$2 pids=()
  mkdir "$directory"
  "$eduba" coordinator --listen 127.0.0.1:0 --group-size "$count" --transport "$transport" >"$directory/coordinator" 2>"$directory/log" &
  started+=($!)
  local address=
  for ((wait = 0; wait < 100; ++wait)); do
    address=$(sed -n 's/^ready: //p' "$directory/coordinator")
    [[ -n $address ]] && break
    sleep 0.1
  done
  start_worker() {
    NCCL_HOSTID=eduba-worker-$1 "$eduba" worker --coordinator "$address" --listen 127.0.0.1:0 --device cuda:0 --transport "$transport" \
      --memory-bytes 1GiB >"$directory/worker-$1" 2>&1 &
    pids+=($!)
    started+=($!)
  }
  active() {
    for ((wait = 0; wait < 600; ++wait)); do
      "$eduba" workers --server "$address" --json 2>/dev/null |
        python3 -c 'import json, sys; sys.exit(json.load(sys.stdin)["state"] != "active")' 2>/dev/null && return 0
      sleep 0.1
    done
    echo "the group did not form"
    tail -n 3 "$directory"/*
    return 1
  }
  answer() {
    "$eduba" session create "$1" --server "$address" --query-heads 8 --kv-heads 2 --head-dim 64 --dtype bf16 --sink-tokens 4 &&
      "$eduba" session append "$1" --server "$address" --keys "$scratch/k.npy" --values "$scratch/v.npy" &&
      "$eduba" session attend "$1" --server "$address" --queries "$scratch/q.npy" --out "$directory/$1.npy"
  }
  for ((w = 0; w < count; ++w)); do start_worker "$w"; done
  active && answer before || return 1
  cmp "$directory/before.npy" "$scratch/cpu.npy" || return 1
  kill -KILL "${pids[count - 1]}"
  "$eduba" session attend before --server "$address" --queries "$scratch/q.npy" --out "$directory/none.npy" --timeout 30 && {
    echo "an answer came from a group that had lost a worker"
    return 1
  }
  start_worker "$count"
  sleep 2
  active && answer after || return 1
  cmp "$directory/after.npy" "$scratch/cpu.npy" || return 1
  echo "$count workers over $transport: the CPU's bytes before and after a SIGKILL"
}

# The answer that every group must give: the CPU's.
cpu_answer() {
  python3 - "$scratch" <<'PY' || return 1
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
  "$eduba" up --workers 1 --listen 127.0.0.1:0 --memory-bytes 1GiB >"$scratch/up" 2>&1 &
  local pid=$! address=
  started+=("$pid")
  for ((wait = 0; wait < 100; ++wait)); do
    address=$(sed -n 's/^ready: //p' "$scratch/up")
    [[ -n $address ]] && break
    sleep 0.1
  done
  "$eduba" session create cpu --server "$address" --query-heads 8 --kv-heads 2 --head-dim 64 --dtype bf16 --sink-tokens 4 &&
    "$eduba" session append cpu --server "$address" --keys "$scratch/k.npy" --values "$scratch/v.npy" &&
    "$eduba" session attend cpu --server "$address" --queries "$scratch/q.npy" --out "$scratch/cpu.npy"
  local code=$?
  kill "$pid"
  wait "$pid"
  return "$code"
}

build_all() {
  cmake --preset release -DEDUBA_CUDA=ON &&
    cmake --build --preset release -j "$(nproc)" --target eduba backend_test communicator_contract_test nccl_communicator_test \
      communicator_rank slab_pool_test layer_kernels_test gpu_layers_test
}

# Not a test may be skipped here for want of a GPU.
contract() {
  "$build/bin/backend_test" --gtest_filter='*/cuda:*/cuda_tensor:CudaBackend.*' | tee "$scratch/contract" || return 1
  ! grep -q 'SKIPPED, NOT TESTED: cuda' "$scratch/contract"
}

# The layers of a model: on the GPU, with its cuBLASLt.
layers() {
  {
    "$build/bin/layer_kernels_test" --gtest_filter='*/cuda:*/cuda_bf16:CudaLayerKernels.*:CublasLt.*' &&
      "$build/bin/gpu_layers_test" --gtest_filter='*/cuda'
  } | tee "$scratch/layers" || return 1
  ! grep -q 'SKIPPED, NOT TESTED: cuda' "$scratch/layers"
}

# model_on_gpu ACTIVATIONS: nano on cuda:0, on one worker and on two: the same text and log-probs.
model_on_gpu() {
  local workers
  for workers in 1 2; do
    local directory=$scratch/model-$1-$workers address=
    mkdir "$directory"
    "$eduba" up --workers "$workers" --device cuda:0 --model nano --activations "$1" --listen 127.0.0.1:0 --memory-bytes 1GiB \
      >"$directory/up" 2>&1 &
    local pid=$!
    started+=("$pid")
    for ((wait = 0; wait < 300; ++wait)); do
      address=$(sed -n 's/^ready: //p' "$directory/up")
      [[ -n $address ]] && break
      sleep 0.1
    done
    [[ -n $address ]] || { cat "$directory/up"; return 1; }
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

# bench_attend PRECISION OPTION...: with as many keys as the device holds, up to 4 Mi (16 GiB).
bench_attend() {
  local precision=$1 free
  shift
  free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | head -n 1)
  "$eduba" bench attend --device cuda:0 --precision "$precision" --bytes "$((free > 20480 ? 16384 : free / 2))MiB" "$@"
}

# What the kernels are bound by, for whoever finds a figure missed: every launch of a short run, in a file beside the report.
profile() {
  ncu --set full --kernel-name "regex:$2" "$eduba" bench attend --device cuda:0 --precision "$1" --bytes 1GiB --rounds 1 |
    tee "${report%.md}-$1.txt"
}

# Ends with 3 where there is nothing to compare with.
torch_beside() { python3 benchmarks/sdpa_gpu.py; }

sanitizer() { compute-sanitizer --tool "$1" --error-exitcode 9 "$build/bin/backend_test" --gtest_filter="$2"; }

layers_under() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$build/bin/layer_kernels_test" \
    --gtest_filter='*NormsMatch*/cuda:*RotationsMatch*/cuda:*ActivationsMatch*/cuda:*NotFinite*/cuda'
}

{
  printf '# Eduba on a GPU\n\n%s, commit %s\n\n```\n' "$(date -u +'%Y-%m-%d %H:%M UTC')" "$(git rev-parse HEAD)"
  [[ $gpu == no ]] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  printf '```\n'
} >"$report"

step "build" build_all
if ((failed > 0)); then
  echo "gpu/run: the build failed; $report" >&2
  exit 1
fi
step "doctor" "$eduba" doctor --timeout 1
step "contract of the cuda backend" contract
step "contract of a model's layers" layers
step "contract of the transports" "$build/bin/communicator_contract_test"
step "nccl's own tests" "$build/bin/nccl_communicator_test"
if [[ $quick == no ]]; then
  for path in cuda cuda_tensor; do
    step "memcheck of $path" sanitizer memcheck "*RandomProblems*/$path"
    step "racecheck of $path" sanitizer racecheck "*ThreadsDoNotChange*/$path"
  done
  step "memcheck of layers" layers_under memcheck
  step "racecheck of layers" layers_under racecheck
else
  skip "memcheck and racecheck" "--quick"
fi
step "an answer of the CPU" cpu_answer
for activations in f32 bf16; do
  step "a model on the GPU, activations $activations" model_on_gpu "$activations"
done
step "2 ranks over NCCL, one killed" nccl_group 2
step "4 ranks over NCCL, one killed" nccl_group 4
for transport in gloo nccl; do
  for count in 2 4; do
    step "$count workers over $transport on one GPU, one killed" workers_of "$transport" "$count"
  done
done
unset "${!NCCL_@}"
for precision in exact tensor; do
  lines=60 step "bench attend, $precision" bench_attend "$precision"
  lines=600 step "bench attend, $precision, as JSON" bench_attend "$precision" --json
done
if [[ $gpu == yes ]] && ! python3 -c 'import torch' 2>/dev/null; then
  skip "PyTorch's attention beside it" "python3 has no torch (pip install torch)"
else
  step "PyTorch's attention beside it" torch_beside
fi
if [[ $gpu == yes ]] && ! command -v ncu >/dev/null; then
  skip "profiles" "ncu is not installed (it comes with the CUDA toolkit)"
else
  step "profile of the exact kernel" profile exact AttendKernel
  step "profile of the tensor kernel" profile tensor 'TensorKernel|WarpgroupKernel'
fi
# The real payloads; NCCL where every rank can have a GPU of its own.
gpus=1
[[ $gpu == no ]] || gpus=$(nvidia-smi -L | grep -c GPU)
step "bench merge, $((gpus > 1 ? gpus : 2)) ranks" "$eduba" bench merge --ranks "$((gpus > 1 ? gpus : 2))"
((gpus > 1)) || skip "NCCL's latency" "one GPU: ranks that share it take turns, which is no latency"

if [[ $gpu == no ]]; then
  echo "gpu/run: no GPU on this machine (nvidia-smi lists none): $skipped steps SKIPPED, NOT TESTED; nothing was tested" >&2
  exit 2
fi
printf '\n%d steps failed.\n' "$failed" >>"$report"
lines_skipped=$(grep -c 'SKIPPED, NOT TESTED' "$report")
printf '%d steps were skipped; %d lines say "SKIPPED, NOT TESTED".\n' "$skipped" "$lines_skipped" >>"$report"
echo "gpu/run: $failed steps failed, $skipped were skipped; report: $report"
((failed == 0))
