"""Writes tests/golden/nano/: eduba-nano's own weights far beyond its window, by the definition in model/nano/nano_model.py.

    python tests/golden/make_nano.py --data DATA      (DATA: what model/nano/fetch_hsmm.py wrote; pip install torch numpy)

nano_model_test.py holds nano_model.py against a StreamingLLM cache, query by query, and against transformers' Llama.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "model/nano"))

from cell_sentences import SINK, SINKS  # noqa: E402
from nano_model import WINDOW, Nano  # noqa: E402

TOKENS = 1500  # Of the second cell's end and the third cell's beginning.
EVERY = 100
TOP = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "model/nano/weights")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "nano")
    args = parser.parse_args()
    torch.set_num_threads(1)
    third = np.load(args.data / "ranges.npy")[2, 0]
    ids = np.load(args.data / "ids.npy")[third - TOKENS // 2:][:TOKENS]
    with torch.inference_mode():
        model = Nano.load(args.model).double()
        positions = np.arange(EVERY - 1, TOKENS, EVERY)
        hidden = model(torch.from_numpy(ids.astype(np.int64))[None])[0]
        logits = hidden[positions] @ model.embed_tokens.weight.T
        top = torch.topk(logits, TOP)
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / "ids.npy", ids.astype(np.int32))
    np.save(args.out / "positions.npy", positions.astype(np.int32))
    np.save(args.out / "hidden_f64.npy", hidden[positions].numpy().astype(np.float32))
    np.save(args.out / "hidden_mean_f64.npy", hidden.mean(0).numpy().astype(np.float32))
    np.save(args.out / "top_ids.npy", top.indices.numpy().astype(np.int32))
    np.save(args.out / "top_logits_f64.npy", top.values.numpy().astype(np.float32))
    (args.out / "golden.json").write_text(json.dumps({
        "made_by": "tests/golden/make_nano.py", "torch": torch.__version__, "sink_token_id": SINK, "sink_tokens": SINKS,
        "window": WINDOW, "weights": "bf16 as stored, computed in float64", "tolerance": 1e-4,
        "tolerance_means": "max |got - wanted| <= tolerance * max |wanted|, hidden states and logits alike",
        "largest_logit": round(float(logits.abs().max()), 4)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
