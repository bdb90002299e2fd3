"""Google's Gemma-3-270M through the real program, against what transformers answered (gemma3_270m/golden.json).

    python tests/golden/check_gemma3.py --model HF        (HF: what gemma3_from_gguf.py wrote; pip install numpy torch safetensors)

The bf16 weights are widened to float32 first, in a folder of its own, so that keys and values are kept in float32 too, as transformers keeps
them here. Compared are the prompts' token ids, the greedy continuations, and the 20 largest logits up to their common
offset: `eduba score` gives log-probabilities, whose differences are the logits'."""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import safetensors.torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))
import program  # noqa: E402

program.COMMAND_TIMEOUT_S = program.START_TIMEOUT_S = 600


def widen(model, folder):
    tensors = {k: v.float() for k, v in safetensors.torch.load_file(model / "model.safetensors").items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        if (model / name).exists():
            shutil.copy(model / name, folder / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    golden = json.loads((pathlib.Path(__file__).parent / "gemma3_270m" / "golden.json").read_text())
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "gemma3").mkdir()
        widen(args.model, folder / "gemma3")
        with program.Server("--workers", args.workers, "--model", folder / "gemma3", memory="1GiB") as server:
            for case in golden["cases"]:
                (folder / "prompt.txt").write_text(case["prompt"])
                server.run("session", "create", "s", "--model")
                length = server.report("session", "append", "s", "--text", folder / "prompt.txt")["length"]
                np.save(folder / "ids.npy", np.array(case["ids"], np.int32))
                stored = server.report("session", "append", "s", "--tokens", folder / "ids.npy", "--at", 0)["already_stored"]
                got = []
                for token in case["top_ids"]:
                    np.save(folder / "token.npy", np.array([token], np.int32))
                    server.run("score", "s", "--tokens", folder / "token.npy", "--out", folder / "p.npy")
                    got.append(float(np.load(folder / "p.npy")[0]))
                wanted = np.array(case["top_logits"])
                difference = np.array(got) - wanted
                error = np.ptp(difference) / case["largest_logit"]
                greedy = server.report("generate", "s", "--max-tokens", len(case["greedy"]), "--ignore-eos")["tokens"]
                server.run("session", "delete", "s")
                same = length == stored == len(case["ids"]) and greedy == case["greedy"]
                failures += not same or error > 2 * golden["tolerance"]
                print(f"{case['prompt']!r}: ids {'equal' if length == stored == len(case['ids']) else 'DIFFER'}, {len(greedy)} greedy tokens "
                      f"{'equal' if greedy == case['greedy'] else 'DIFFER'}, logits within {error:.1e} of the largest", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
