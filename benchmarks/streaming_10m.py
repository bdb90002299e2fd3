"""Perplexity, memory and speed along a stream of ten million tokens, with token sinks and without.

    PYTHON benchmarks/streaming_10m.py --data DATA [--tokens 10000000]
    (a Python with numpy; DATA is what model/nano/fetch_hsmm.py wrote; needs the release build)

eduba-nano reads the first million tokens of the HSMM atlas again and again, so that every million holds the same text and only the length
differs: nothing it computes can reach back further than 4 layers of 256 tokens. In each million the last 100,000 tokens are scored (each given
everything before it), by `eduba score` ahead of each append. Two sessions: `streaming` with 4 sinks and rolling positions, which is how the model
was trained, and the same window without sinks. Wanted: the last million's perplexity within 1 % of the second's; resident memory constant
within 1 % from the second million on."""

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
SESSIONS = {"4 sinks": (4, "rolling"), "no sinks": (0, "absolute")}


def resident_mib(server):
    for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=10 * MILLION)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    text = np.load(args.data / "ids.npy").astype(np.int32)[:MILLION]
    millions = args.tokens // MILLION
    losses = {name: [] for name in SESSIONS}
    resident = {name: [] for name in SESSIONS}
    print("%8s %10s %12s %12s %14s" % ("million", "session", "perplexity", "tokens/s", "resident MiB"), flush=True)
    for name, (sinks, positions) in SESSIONS.items():
        with tempfile.TemporaryDirectory() as folder, program.Server(
                "--workers", args.workers, "--model", ROOT / "model/nano/weights", memory="64MiB") as server:
            def path(file):
                return str(pathlib.Path(folder) / file)

            def append(some):
                np.save(path("ids.npy"), some)
                return server.report("session", "append", "s", "--tokens", path("ids.npy"), "--timeout", 3600)["seconds"]

            server.run("session", "create", "s", "--model", "--policy", "streaming", "--sink-tokens", sinks, "--window", 256,
                       "--positions", positions)
            if sinks:
                append(np.zeros(sinks, np.int32))
            for million in range(1, millions + 1):
                seconds = append(text[:MILLION - SCORED])
                log_probs = []
                for at in range(MILLION - SCORED, MILLION, PIECE):
                    np.save(path("piece.npy"), text[at:at + PIECE])
                    server.run("score", "s", "--tokens", path("piece.npy"), "--out", path("p.npy"), "--timeout", 3600)
                    log_probs.append(np.load(path("p.npy")))
                    append(text[at:at + PIECE])
                losses[name].append(-float(np.concatenate(log_probs).astype(np.float64).mean()))
                resident[name].append(resident_mib(server))
                print("%8d %10s %12.2f %12.0f %14.1f" % (million, name, np.exp(losses[name][-1]), (MILLION - SCORED) / seconds,
                                                         resident[name][-1]), flush=True)
    missed = 0
    for name, values in losses.items():
        drift = np.exp(values[-1] - values[1]) - 1
        grown = resident[name][-1] / resident[name][1] - 1
        print(f"{name}: perplexity of million {millions} over that of the second {drift:+.4%}, memory {grown:+.2%}")
        missed += SESSIONS[name][0] > 0 and (abs(drift) > 0.01 or abs(grown) > 0.01)
    print(f"without sinks the perplexity is {np.exp(losses['no sinks'][-1] - losses['4 sinks'][-1]):.2f} times that with them")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
