"""Compares two builds of `eduba` by alternating short runs of `bench attend`, `bench merge` and `bench append`.

    /usr/bin/python3 benchmarks/paired.py BEFORE AFTER [--rounds 7] [--bench attend,merge,append]

BEFORE and AFTER are two `eduba` programs. Each round runs both, in an order that changes from round to round, so that what the
machine does meanwhile meets both alike. The number of a line is the median over the rounds of the ratio after / before of the same
round: of seconds (attend: of one query; merge: the median of its calls; append: of one append), so below 1 is faster. The quartiles say
how far rounds disagree. The last line of each bench is the geometric mean over its lines.
"""

import argparse
import json
import math
import statistics
import subprocess

COMMANDS = {
    "attend": ["bench", "attend", "--json", "--bytes", "256MiB", "--rounds", "5"],
    "merge": ["bench", "merge", "--json", "--rounds", "2000"],
    "append": ["bench", "append", "--json", "--rounds", "5"],
}


def seconds_of(bench, program):
    """Line of the bench -> seconds."""
    run = subprocess.run([program, *COMMANDS[bench]], check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    if bench == "append":
        return {"append": found["bytes"] / found["append_gb_per_s"] / 1e9}
    if bench == "merge":
        return {"{transport} {call} {query_rows} rows of {query_heads} x {value_dim}".format(**line):
                line["median_us"] / 1e6 for line in found}
    return {"{dtype} head_dim {head_dim}, {queries_per_kv_head} a KV head, {query_rows} rows".format(**line):
            line["seconds"] for line in found if "seconds" in line and "query_rows" in line}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bench", default="attend,merge,append")
    args = parser.parse_args()
    for bench in args.bench.split(","):
        ratios = {}
        for round_number in range(args.rounds):
            order = [args.before, args.after]
            if round_number % 2 == 1:
                order.reverse()
            times = {program: seconds_of(bench, program) for program in order}
            for line, seconds in times[args.before].items():
                if line in times[args.after]:
                    ratios.setdefault(line, []).append(times[args.after][line] / seconds)
        print(f"bench {bench}: seconds after / before, {args.rounds} alternating rounds")
        for line, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"  {middle:6.3f}  ({low:.3f} to {high:.3f})  {line}")
        mean = math.exp(statistics.fmean(math.log(statistics.median(v)) for v in ratios.values()))
        print(f"  {mean:6.3f}  geometric mean")


if __name__ == "__main__":
    main()
