"""Generations at once, of sessions whose layers see windows only, on one worker and on more: each has its home on one of them.

    /usr/bin/python3 benchmarks/generations.py [--workers 2] [--tokens 1800] [--processes]
    (needs the release build)

Each generation is an `eduba generate` of its own, of a session of eduba-nano's defaults (`streaming`, window 256). The answers are compared first: a
session's tokens must be the same with all numbers of workers and of neighbours. Then tokens/s of all together, and the server's processor time
a token. Workers, coordinator and clients share one machine here, all of which one worker uses too: so this shows what homes cost beside it, not what
N machines gain (before there were homes, every worker computed every token)."""

import argparse
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))
import program  # noqa: E402

AT_ONCE = (1, 2, 4)


def cpu_seconds(server):
    ticks = 0
    for pid in [server.process.pid, *program.children(server.process.pid)]:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def generate(server, name, seed, tokens):
    return subprocess.Popen([program.EDUBA, "generate", name, "--max-tokens", str(tokens), "--temperature", "1", "--seed", str(seed), "--ignore-eos"],
                            env={**os.environ, "EDUBA_SERVER": server.address}, stdout=subprocess.PIPE, text=True)


def measure(workers, tokens, flags):
    """{at once: (texts, tokens/s, ms of processor time a token)}"""
    results = {}
    with program.Server("--workers", workers, "--model", "nano", *flags, memory="1GiB") as server:
        for count in AT_ONCE:
            for i in range(count):
                server.run("session", "create", f"s{count}.{i}", "--model")
                server.run("generate", f"s{count}.{i}", "--prompt", "GAPDH ACTB", "--max-tokens", 1, "--ignore-eos")
            before, began = cpu_seconds(server), time.monotonic()
            running = [generate(server, f"s{count}.{i}", i, tokens) for i in range(count)]
            texts = [process.communicate()[0] for process in running]
            seconds, cpu = time.monotonic() - began, cpu_seconds(server) - before
            if any(process.returncode != 0 for process in running):
                sys.exit("a generation failed (above)")
            results[count] = (texts, count * tokens / seconds, 1000 * cpu / (count * tokens))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--processes", action="store_true", help="worker processes joined by Gloo")
    args = parser.parse_args()
    flags = ["--processes"] if args.processes else []
    one, more = (measure(workers, args.tokens, flags) for workers in (1, args.workers))
    expected = one[max(AT_ONCE)][0]
    for results in (one, more):
        for count in AT_ONCE:
            if results[count][0] != expected[:count]:
                sys.exit(f"{count} generations at once gave other tokens")
    print("the same tokens for 1 and %d workers, %s at once" % (args.workers, ", ".join(map(str, AT_ONCE))))
    print("%8s %20s %20s %8s %22s" % ("at once", "tokens/s, 1 worker", f"{args.workers} workers", "ratio", "server ms CPU a token"))
    for count in AT_ONCE:
        (_, a, cpu_a), (_, b, cpu_b) = one[count], more[count]
        print("%8d %20.0f %20.0f %8.2f %13.2f -> %5.2f" % (count, a, b, b / a, cpu_a, cpu_b))
    return 0


if __name__ == "__main__":
    sys.exit(main())
