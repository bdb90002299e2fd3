"""A whole atlas as ONE context of 2.02 million tokens, on this machine: read, every cell embedded, a cell generated.

    PYTHON benchmarks/hsmm_2m.py --data DATA [--workers 1] [--activations f32]
    (a Python with numpy; DATA is what model/nano/fetch_hsmm.py wrote; needs the release build)

The HSMM atlas (271 human cells, 2,017,470 expressed genes) as the stream of cell sentences that eduba-nano reads, in a session as the model
comes with it: `streaming`, 4 sinks, a window of 256, rolling positions. Printed are tokens/s, and their growth: the whole stream's rate over that of its first 100,000
tokens (0.9 wanted; 1 is linear); the server's peak of resident memory; and whether vectors are right: cells of which the first are embedded
in a session of their own have the same bytes."""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))
import program  # noqa: E402

program.COMMAND_TIMEOUT_S = 3600
SINKS = 4  # Ahead of the first token, as the model's streaming.json says.
FIRST = 100_000
PATIENCE = ("--timeout", 3600)


def peak_mib(server):
    for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--activations", default="f32", choices=("f32", "bf16"))
    parser.add_argument("--memory-bytes", default="64MiB", help="the budget for keys and values")
    args = parser.parse_args()
    ids = np.load(args.data / "ids.npy").astype(np.int32)
    ranges = np.load(args.data / "ranges.npy").astype(np.int64) + SINKS
    with tempfile.TemporaryDirectory() as folder, program.Server(
            "--workers", args.workers, "--model", "nano", "--activations", args.activations,
            memory=args.memory_bytes) as server:
        def path(name):
            return str(pathlib.Path(folder) / name)

        def append(session, some):
            np.save(path("ids.npy"), some)
            return server.report("session", "append", session, "--tokens", path("ids.npy"), *PATIENCE)["seconds"]

        def embed(session, some):
            np.save(path("ranges.npy"), some)
            began = time.perf_counter()
            server.run("embed", session, "--ranges", path("ranges.npy"), "--pool", "mean", "--out", path("e.npy"), *PATIENCE)
            return np.load(path("e.npy")), time.perf_counter() - began

        rates = {}
        for name, tokens in (("first", FIRST), ("whole", len(ids))):
            server.run("session", "create", name, "--model")
            rates[name] = tokens / append(name, ids[:tokens])
            print(f"read {tokens:,} tokens: {rates[name]:,.0f} tokens/s, peak {peak_mib(server):,.0f} MiB resident", flush=True)
        few = ranges[ranges[:, 1] <= FIRST]
        some, _ = embed("first", few)
        vectors, seconds = embed("whole", ranges)
        if not np.isfinite(vectors).all() or some.tobytes() != vectors[:len(few)].tobytes():
            print("the vectors of the first cells depend on what comes after them", file=sys.stderr)
            return 1
        print(f"embedded {len(ranges)} cells in {seconds:.1f} s ({len(ids) / seconds:,.0f} tokens/s); the first {len(few)} have the bytes of a "
              f"session of {FIRST:,} tokens")
        answer = server.report("generate", "whole", "--max-tokens", 200, "--temperature", 1, "--seed", 1, "--ignore-eos")
        print(f"generated 200 tokens at {200 / answer['seconds']:,.0f} tokens/s: {answer['text'][:60]} ...")
        print(json.dumps({"workers": args.workers, "activations": args.activations, "tokens": len(ids), "tokens_per_s": round(rates["whole"]),
                          "growth": round(rates["whole"] / rates["first"], 3), "embed_s": round(seconds, 1),
                          "peak_mib": round(peak_mib(server))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
