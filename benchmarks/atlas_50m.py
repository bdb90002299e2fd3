"""A 50-million-cell atlas, exact, on one small machine; the same question put to FAISS and to PyTorch.

    /usr/bin/python3 benchmarks/atlas_50m.py [--cells N] [--rounds R] [--only eduba,faiss,torch] [--torch-python PYTHON]

The cells are synthetic: 256 types, each a point in 61 dimensions, plus noise; a cell's annotation is one of 16. The question is a Gaussian kernel
regression: which annotation do the cells around this one have, each weighted by exp(-distance^2 / (2 sigma^2))? As attention (deploy/demo says why)
the key is [cell, -|cell|^2 / 2] with the last column split over three bf16 columns, so 64 columns, and the value is the annotation, one-hot, 16 columns.

  eduba   `eduba up --workers 2`, bf16, filled over gRPC as any client would; every time is a whole call, from the client's request to its answer
  torch   torch.nn.functional.scaled_dot_product_attention on the same keys and values, bf16 and float32
  faiss   the exact flat index (IndexFlatL2), k = 100 neighbours: another question with the same use, an unweighted vote

Each runs in a process of its own that may not take more than --memory-limit; where the atlas does not fit, it gets the largest of some sizes that does.
Printed: the size it held, peak memory, the median time of one query, and the error against float64 on the same (bf16-rounded) cells, which is
computed while the cells are made. Needs the release build, python3-faiss (Debian), and a Python with torch (PyPI)."""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIMENSIONS = 61
ANNOTATIONS = 16
TYPES = 256
SIGMA_SQUARED = 8.0
CHUNK = 1_000_000
NEIGHBOURS = 100
QUERIES = 4
FRACTIONS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.25, 0.1)


def bf16_bits(array):
    """float32 rounded to bf16, nearest even, as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Cells:
    """Cell i of the synthetic atlas, the same for everybody."""

    def __init__(self):
        random = np.random.default_rng(50)
        self.centres = random.standard_normal((TYPES, DIMENSIONS), dtype=np.float32)
        self.noise = random.standard_normal((1 << 16, DIMENSIONS), dtype=np.float32) * np.float32(0.35)

    def types(self, begin, end):
        return ((np.arange(begin, end, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(9)) % np.uint64(TYPES)

    def chunk(self, begin, end):
        """Keys [n, 64] and values [n, 16] as bf16 bits, of cells [begin, end)."""
        types = self.types(begin, end)
        cells = self.noise[(np.arange(begin, end, dtype=np.uint64) * np.uint64(40503)) & np.uint64(0xFFFF)]
        cells += self.centres[types]
        keys = np.empty((end - begin, DIMENSIONS + 3), np.uint16)
        keys[:, :DIMENSIONS] = bf16_bits(cells)
        stored = from_bf16(keys[:, :DIMENSIONS])
        rest = np.einsum("nd,nd->n", stored, stored) * np.float32(-0.5)
        for column in range(DIMENSIONS, DIMENSIONS + 3):
            keys[:, column] = bf16_bits(rest)
            rest -= from_bf16(keys[:, column])
        values = np.zeros((end - begin, ANNOTATIONS), np.uint16)
        values[np.arange(end - begin), types % np.uint64(ANNOTATIONS)] = 0x3F80  # 1.0
        return keys, values

    def queries(self):
        """[QUERIES, 61]: cells that are not in the atlas, and the annotation each should get."""
        random = np.random.default_rng(51)
        types = random.integers(0, TYPES, QUERIES)
        cells = self.centres[types] + random.standard_normal((QUERIES, DIMENSIONS), dtype=np.float32) * np.float32(0.35)
        return cells, types % ANNOTATIONS


def as_attention(cells):
    """Query vectors whose logit with a key is -distance^2 / (2 sigma^2), up to a constant of the query."""
    return np.concatenate([cells, np.ones((len(cells), 3), np.float32)], axis=1) / np.float32(SIGMA_SQUARED)


class Oracle:
    """The definition in float64, chunk by chunk."""

    def __init__(self, queries):
        self.queries = queries.astype(np.float64)
        self.top = np.full(len(queries), -np.inf)
        self.total = np.zeros(len(queries))
        self.sums = np.zeros((len(queries), ANNOTATIONS))

    def add(self, keys, values):
        logits = self.queries @ from_bf16(keys).astype(np.float64).T
        top = np.maximum(self.top, logits.max(axis=1))
        scale = np.exp(self.top - top)
        weights = np.exp(logits - top[:, None])
        self.total = self.total * scale + weights.sum(axis=1)
        self.sums = self.sums * scale[:, None] + weights @ from_bf16(values).astype(np.float64)
        self.top = top

    def error(self, got):
        want = self.sums / self.total[:, None]
        return max(np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in zip(got.astype(np.float64), want))


def progress(what, done, total):
    end = "\n" if done == total else ""
    print(f"\r{what}: {100 * done // total:3d} %{end}", end="", file=sys.stderr, flush=True)


def peak_gib(pid="self"):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / (1 << 20)
    return 0.0


def timed(query, rounds):
    """query(i) for each query; the median and slowest time, and the answers."""
    query(0)  # Not timed: memory and code that were never touched.
    seconds = []
    answers = []
    for i in range(QUERIES * rounds):
        began = time.perf_counter()
        answer = query(i % QUERIES)
        seconds.append(time.perf_counter() - began)
        if i < QUERIES:
            answers.append(answer)
    return {"seconds": statistics.median(seconds), "slowest": max(seconds)}, np.array(answers)


def run_eduba(cells, arguments):
    sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))
    sys.path.insert(0, str(ROOT / "build" / "release" / "tests" / "end_to_end" / "stubs"))
    import grpc_client_example as client  # The client of docs/grpc.md.
    import program
    pb = client.pb

    def messages(plan, begin, keys, values, worker):
        rows = client.PIECE_BYTES // (keys[0].nbytes + values[0].nbytes)
        for extent in plan.extents:
            if extent.worker != worker:
                continue
            for first in range(extent.first_position, extent.first_position + extent.count, rows):
                count = min(rows, extent.first_position + extent.count - first)
                part = slice(first - begin, first - begin + count)
                yield pb.UploadRequest(append_id=plan.append_id, first_position=first, count=count, dtype=pb.DTYPE_BF16,
                                       keys=keys[part].tobytes(), values=values[part].tobytes())

    atlas = Cells()
    questions, want = atlas.queries()
    oracle = Oracle(as_attention(questions))
    memory = cells * 160 + (1 << 30)
    with program.Server("--workers", 2, memory=memory) as server:
        channel, eduba = client.connect(server.address)
        session = eduba.CreateSession(pb.CreateSessionRequest(name="atlas", spec=pb.SessionSpec(
            query_heads=1, kv_heads=1, head_dim=64, value_dim=ANNOTATIONS, dtype=pb.DTYPE_BF16, scale=1.0)), timeout=30)
        loading = 0.0
        for begin in range(0, cells, CHUNK):
            end = min(begin + CHUNK, cells)
            keys, values = atlas.chunk(begin, end)
            oracle.add(keys, values)
            began = time.perf_counter()
            plan = eduba.PlanAppend(pb.PlanAppendRequest(session="atlas", at=begin, count=end - begin), timeout=60)
            with client.ThreadPoolExecutor(len(plan.workers)) as pool:
                def upload(worker):
                    with client.grpc.insecure_channel(plan.workers[worker]) as workers:
                        return client.rpc.PagesStub(workers).Upload(messages(plan, begin, keys, values, worker), timeout=600)
                list(pool.map(upload, range(len(plan.workers))))
            eduba.CommitAppend(pb.CommitAppendRequest(append_id=plan.append_id), timeout=600)
            loading += time.perf_counter() - began
            progress("eduba: cells", end, cells)

        summaries = []

        def query(i):
            rows = as_attention(questions[i:i + 1])[:, None, :]
            outputs, _, _, summary = client.attend(eduba, session, rows)
            summaries.append(summary)
            return outputs[0, 0]
        result, answers = timed(query, arguments.rounds)
        result["stream_gb_per_s"] = json.loads(server.run("bench", "stream", "--json"))["gb_per_s"]
        result["gb_per_s"] = 1e-9 * summaries[-1].bytes_read / result["seconds"]
        result |= {"peak_gib": peak_gib(server.process.pid), "loading_seconds": loading, "collectives": summaries[-1].collectives}
        channel.close()
    return result | {"error": oracle.error(answers), "right": int(sum(answers.argmax(axis=1) == want))}


def run_torch(cells, arguments, dtype):
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    atlas = Cells()
    questions, want = atlas.queries()
    oracle = Oracle(as_attention(questions))
    keys = torch.empty((1, 1, cells, DIMENSIONS + 3), dtype=kind)
    values = torch.empty((1, 1, cells, ANNOTATIONS), dtype=kind)
    for begin in range(0, cells, CHUNK):
        end = min(begin + CHUNK, cells)
        k, v = atlas.chunk(begin, end)
        oracle.add(k, v)
        keys[0, 0, begin:end] = torch.from_numpy(from_bf16(k))
        values[0, 0, begin:end] = torch.from_numpy(from_bf16(v))
        progress(f"torch {dtype}: cells", end, cells)

    def query(i):
        q = torch.from_numpy(as_attention(questions[i:i + 1])).to(kind)[None, None]
        with torch.inference_mode():
            return scaled_dot_product_attention(q, keys, values, scale=1.0)[0, 0, 0].float().numpy()
    result, answers = timed(query, arguments.rounds)
    return result | {"peak_gib": peak_gib(), "error": oracle.error(answers), "right": int(sum(answers.argmax(axis=1) == want)),
                     "version": torch.__version__}


def run_faiss(cells, arguments):
    import faiss
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    atlas = Cells()
    questions, want = atlas.queries()
    index = faiss.IndexFlatL2(DIMENSIONS)
    for begin in range(0, cells, CHUNK):
        end = min(begin + CHUNK, cells)
        index.add(from_bf16(atlas.chunk(begin, end)[0][:, :DIMENSIONS]))
        progress("faiss: cells", end, cells)

    def query(i):
        _, found = index.search(questions[i:i + 1], NEIGHBOURS)
        types = np.array([atlas.types(f, f + 1)[0] for f in found[0]])
        return np.bincount((types % np.uint64(ANNOTATIONS)).astype(int), minlength=ANNOTATIONS) / NEIGHBOURS
    result, answers = timed(query, arguments.rounds)
    return result | {"peak_gib": peak_gib(), "right": int(sum(answers.argmax(axis=1) == want)), "version": faiss.__version__}


RUNS = {"eduba": run_eduba, "torch-bf16": lambda n, a: run_torch(n, a, "bf16"), "torch-f32": lambda n, a: run_torch(n, a, "f32"),
        "faiss": run_faiss}


def largest_that_fits(name, arguments):
    """Runs one contender in processes of its own, smaller each time, until one does not run out of memory."""
    python = arguments.torch_python if name.startswith("torch") else sys.executable
    for fraction in FRACTIONS:
        cells = int(arguments.cells * fraction)
        command = [python, __file__, "--run", name, "--cells", str(cells), "--rounds", str(arguments.rounds),
                   "--memory-limit", str(arguments.memory_limit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return {"name": name, "cells": cells} | json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {cells} cells do not fit", file=sys.stderr)
    return {"name": name, "cells": 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of %d queries" % QUERIES)
    parser.add_argument("--only", default=",".join(RUNS), help="comma-separated contenders")
    parser.add_argument("--memory-limit", type=float, default=20, help="GiB of address space of a contender's own process")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        if arguments.run != "eduba":
            limit = int(arguments.memory_limit * (1 << 30))
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(json.dumps(RUNS[arguments.run](arguments.cells, arguments)))
        return
    results = [largest_that_fits(name, arguments) for name in arguments.only.split(",")]
    print("%-11s %11s %9s %10s %10s %9s %7s" % ("", "cells", "peak GiB", "s a query", "slowest s", "error", "right"))
    for r in results:
        if r["cells"] == 0:
            print("%-11s does not fit" % r["name"])
            continue
        print("%-11s %11d %9.2f %10.3f %10.3f %9s %4d/%d" % (
            r["name"], r["cells"], r["peak_gib"], r["seconds"], r["slowest"], "%.1e" % r["error"] if "error" in r else "",
            r["right"], QUERIES))
    for r in results:
        print(json.dumps(r))


if __name__ == "__main__":
    main()
