"""Perplexity, memory and speed along a stream of ten million tokens, with token sinks and without.

    PYTHON benchmarks/streaming_10m.py --data DATA [--tokens 10000000]
    (a Python with numpy; DATA is what model/nano/fetch_hsmm.py wrote; needs the release build)

eduba-nano reads the first million tokens of the HSMM atlas again and again, so that every million holds the same text and only the length
differs: nothing it computes can reach back further than 4 layers of 256 tokens. In each million the last 100,000 tokens are scored (each given
everything before it), by `eduba score` before each append. Two sessions: `streaming` with 4 sinks and rolling positions, which is how the model
was trained, and the same window without sinks (at absolute positions; without sinks there is nothing to roll). Wanted: the last million's
perplexity within 1 % of the second's, and constant memory. Pages are: their bytes must be equal but for one page a layer, which a window begins to
touch or not. The token ids that coordinator and worker keep, for repeated appends and embeddings, are on the disk; by how many bytes a token the process
grows all the same is printed."""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))
import program  # noqa: E402

program.COMMAND_TIMEOUT_S = 3600
MILLION = 1_000_000
SCORED, PIECE = 100_000, 20_000
PAGE_OF_ALL_LAYERS = 4 * 256 * 2 * (32 + 32) * 2  # Layers, positions, heads, keys and values, bf16.
SESSIONS = {"4 sinks": (), "no sinks": ("--sink-token", "none", "--sink-tokens", 0, "--positions", "absolute")}


def resident(server):
    for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=10 * MILLION)
    parser.add_argument("--tokens-without-sinks", type=int, default=3 * MILLION)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    text = np.load(args.data / "ids.npy").astype(np.int32)[:MILLION]
    millions = {"4 sinks": args.tokens // MILLION, "no sinks": args.tokens_without_sinks // MILLION}
    losses = {name: [] for name in SESSIONS}
    bytes_used = {name: [] for name in SESSIONS}  # (pages, process)
    print("%8s %10s %12s %12s %12s %14s" % ("million", "session", "perplexity", "tokens/s", "pages KiB", "resident MiB"), flush=True)
    for name, flags in SESSIONS.items():
        with tempfile.TemporaryDirectory() as folder, program.Server(
                "--workers", args.workers, "--model", "nano", memory="64MiB") as server:
            def path(file):
                return str(pathlib.Path(folder) / file)

            def append(some):
                np.save(path("ids.npy"), some)
                return server.report("session", "append", "s", "--tokens", path("ids.npy"), "--timeout", 3600)["seconds"]

            server.run("session", "create", "s", "--model", *flags)
            for million in range(1, millions[name] + 1):
                seconds = append(text[:MILLION - SCORED])
                log_probs = []
                for at in range(MILLION - SCORED, MILLION, PIECE):
                    np.save(path("piece.npy"), text[at:at + PIECE])
                    server.run("score", "s", "--tokens", path("piece.npy"), "--out", path("p.npy"), "--timeout", 3600)
                    log_probs.append(np.load(path("p.npy")))
                    append(text[at:at + PIECE])
                losses[name].append(-float(np.concatenate(log_probs).astype(np.float64).mean()))
                pages = sum(w["memory_used_bytes"] for w in server.report("workers")["workers"])
                bytes_used[name].append((pages, resident(server)))
                print("%8d %10s %12.2f %12.0f %12.0f %14.1f" % (million, name, np.exp(losses[name][-1]), (MILLION - SCORED) / seconds,
                                                                pages / 2**10, bytes_used[name][-1][1] / 2**20), flush=True)
    missed = 0
    for name, values in losses.items():
        drift = np.exp(values[-1] - values[1]) - 1
        (pages, process), (last_pages, last_process) = bytes_used[name][1], bytes_used[name][-1]
        print(f"{name}: perplexity of million {len(values)} over that of the second {drift:+.4%}; pages {last_pages - pages:+d} bytes; the process "
              f"{(last_process - process) / (MILLION * max(1, len(values) - 2)):+.1f} bytes a token")
        missed += name == "4 sinks" and (abs(drift) > 0.01 or abs(pages - last_pages) > PAGE_OF_ALL_LAYERS)
    print(f"without sinks the perplexity is {np.exp(losses['no sinks'][-1] - losses['4 sinks'][-1]):.2f} times that with them")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
