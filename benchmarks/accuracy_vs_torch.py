"""Error against float64 for logits from ordinary to absurd, beside PyTorch's fp32 scaled_dot_product_attention on the same arrays.

    PYTHON benchmarks/accuracy_vs_torch.py          (a Python with numpy and torch; needs the release build)

For every head_dim, length and size of logit: 8 query rows against float32 keys and values, through the real program. The error of a row is
|got - want| / |want| over its value channels; printed are the worst and the median over all rows of SEEDS seeds. Exits with 1 when Eduba's worst or
median is above PyTorch's (and above 2^-24, the rounding of the answer itself) anywhere, or anything is not finite."""

import pathlib
import sys
import tempfile

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "end_to_end"))
import program  # noqa: E402

ROWS = 8
SEEDS = 24
HEAD_DIMS = (64, 128)
LENGTHS = (300, 10_000)
LOGITS = (5, 20, 60, 150, 300, 1000)


def problem(head_dim, length, logit, seed):
    """Queries [ROWS, d], keys [n, d], values [n, 64], float32, with the largest |logit| close to `logit`; scale 1 / sqrt(d)."""
    random = np.random.default_rng([head_dim, length, logit, seed])
    queries = random.standard_normal((ROWS, head_dim))
    keys = random.standard_normal((length, head_dim))
    values = random.standard_normal((length, 64)).astype(np.float32)
    size = np.abs(queries @ keys.T).max() / np.sqrt(head_dim)
    return (queries * (logit / size)).astype(np.float32), keys.astype(np.float32), values


def definition(queries, keys, values):
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T / np.sqrt(np.float64(queries.shape[1]))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ values.astype(np.float64) / weights.sum(axis=1, keepdims=True)


def errors(got, want):
    return np.linalg.norm(got.astype(np.float64) - want, axis=1) / np.linalg.norm(want, axis=1)


def ask_eduba(server, folder, queries, keys, values):
    files = {name: str(folder / f"{name}.npy") for name in ("q", "k", "v", "o")}
    np.save(files["q"], queries[:, None])
    np.save(files["k"], keys[:, None])
    np.save(files["v"], values[:, None])
    server.run("session", "create", "s", "--query-heads", 1, "--kv-heads", 1, "--head-dim", keys.shape[1], "--value-dim", 64)
    server.run("session", "append", "s", "--keys", files["k"], "--values", files["v"])
    server.run("session", "attend", "s", "--queries", files["q"], "--out", files["o"])
    server.run("session", "delete", "s")
    return np.load(files["o"])[:, 0]


def ask_torch(queries, keys, values):
    with torch.inference_mode():
        return scaled_dot_product_attention(*(torch.from_numpy(a)[None, None] for a in (queries, keys, values)))[0, 0].numpy()


def main():
    worse = 0
    print(f"torch {torch.__version__}, fp32\n%8s %7s %6s %12s %12s %12s %12s" % (
        "head_dim", "keys", "logit", "worst", "torch worst", "median", "torch median"))
    with program.Server() as server, tempfile.TemporaryDirectory() as folder:
        for head_dim in HEAD_DIMS:
            for length in LENGTHS:
                for logit in LOGITS:
                    ours, theirs = [], []
                    for seed in range(SEEDS):
                        arrays = problem(head_dim, length, logit, seed)
                        want = definition(*arrays)
                        ours.append(errors(ask_eduba(server, pathlib.Path(folder), *arrays), want))
                        theirs.append(errors(ask_torch(*arrays), want))
                    row = (np.max(ours), np.max(theirs), np.median(ours), np.median(theirs))
                    bad = not np.isfinite(row[0]) or row[0] > row[1] or row[2] > max(row[3], 2**-24)
                    worse += bad
                    print("%8d %7d %6d %12.2e %12.2e %12.2e %12.2e%s" % (head_dim, length, logit, *row, "  WORSE" if bad else ""), flush=True)
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
