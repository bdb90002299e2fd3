"""One model, one machine: prefill and decode of Eduba and of PyTorch (transformers), side by side.

    PYTHON benchmarks/model_vs_torch.py [--threads 2] [--prompt 2048] [--decode 64] [--rounds 3]
    (a Python with numpy, torch and transformers; needs the release build)

A Llama of 16 layers, 1,024 wide, with random bf16 weights (253 million), written as a Hugging Face folder. Eduba runs it as `eduba up
--workers 1 --model FOLDER`, and is timed from the outside, by the commands a user would give. PyTorch runs it through transformers with
scaled_dot_product_attention and its own cache, in bf16 and with the weights widened to f32.

Checked first: Eduba gives the same greedy continuation of the prompt as PyTorch in f32, and the log-probabilities of that continuation
are compared: the worst error against PyTorch in f32. Prefill is the prompt into an empty context; decode is tokens after it, one
context. The rounds alternate, best of each counts. Eduba is run twice: as it is, with f32 activations whatever the weights' type, and
with `--activations bf16`, which rounds what bf16 weights and keys are multiplied with; PyTorch's bf16 rounds everything to bf16."""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "end_to_end"))
import program  # noqa: E402

SEED = 20261124


def make_model(folder):
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


class Torch:
    def __init__(self, folder, dtype):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()

    def run(self, ids, decode):
        """(seconds of prefill, seconds of decode, greedy tokens)."""
        with torch.inference_mode():
            began = time.perf_counter()
            out = self.model(torch.from_numpy(ids)[None].long(), use_cache=True, logits_to_keep=1)
            token = out.logits[0, -1].argmax()
            prefill = time.perf_counter() - began
            tokens, cache = [int(token)], out.past_key_values
            began = time.perf_counter()
            for _ in range(decode):
                out = self.model(token.reshape(1, 1), past_key_values=cache, use_cache=True)
                token, cache = out.logits[0, -1].argmax(), out.past_key_values
                tokens.append(int(token))
            return prefill, time.perf_counter() - began, tokens[:-1]

    def score(self, ids, tokens):
        """Log-probabilities of `tokens` after `ids`."""
        with torch.inference_mode():
            both = torch.from_numpy(np.concatenate([ids, tokens]))[None].long()
            logits = self.model(both, logits_to_keep=len(tokens) + 1).logits[0, :-1].float()
            return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()


class Eduba:
    def __init__(self, model, folder, activations):
        self.server = program.Server("--workers", "1", "--model", model, "--activations", activations, memory="1GiB")
        self.ids_path, self.out_path = (str(pathlib.Path(folder) / name) for name in ("ids.npy", "out.npy"))

    def score(self, ids, tokens):
        np.save(self.ids_path, ids.astype(np.int32))
        self.server.run("session", "create", "s", "--model")
        self.server.run("session", "append", "s", "--tokens", self.ids_path)
        np.save(self.ids_path, np.array(tokens, np.int32))
        self.server.run("score", "s", "--tokens", self.ids_path, "--out", self.out_path)
        self.server.run("session", "delete", "s")
        return np.load(self.out_path)

    def run(self, ids, decode):
        np.save(self.ids_path, ids.astype(np.int32))
        self.server.run("session", "create", "s", "--model")
        prefill = json.loads(self.server.run("session", "append", "s", "--tokens", self.ids_path, "--json"))
        answer = json.loads(self.server.run("generate", "s", "--max-tokens", decode, "--ignore-eos", "--json"))
        self.server.run("session", "delete", "s")
        return prefill["seconds"], answer["seconds"], answer["tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; Eduba takes all cores")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = np.random.default_rng(SEED).integers(3, 32000, args.prompt)
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        parameters = make_model(model)
        print(f"{parameters / 1e6:.0f} M parameters in bf16, {args.prompt} tokens of prompt, {args.decode} decoded; torch {torch.__version__}, "
              f"transformers {transformers.__version__}, {args.threads} threads", flush=True)
        exact, rounded = (Eduba(model, folder, activations) for activations in ("f32", "bf16"))
        servers.enter_context(exact.server)
        servers.enter_context(rounded.server)
        judge = Torch(model, torch.float32)
        runners = {"eduba": exact, "eduba bf16": rounded, "torch f32": judge, "torch bf16": Torch(model, torch.bfloat16)}
        tokens = judge.run(ids, args.decode)[2]
        if exact.run(ids, args.decode)[2] != tokens:
            print("the continuations differ", file=sys.stderr)
            return 1
        wanted = judge.score(ids, tokens)
        best = {name: [np.inf, np.inf] for name in runners}
        for _ in range(args.rounds):
            for name, runner in runners.items():
                best[name] = np.minimum(best[name], runner.run(ids, args.decode)[:2])
        print("%-12s %18s %18s %28s" % ("", "prefill tokens/s", "decode tokens/s", "worst error of log-prob"))
        for name, (prefill, decode) in best.items():
            error = np.abs(runners[name].score(ids, tokens) - wanted).max()
            print("%-12s %18.1f %18.2f %28.1e" % (name, args.prompt / prefill, args.decode / decode, error))
        for ours, theirs in (("eduba", "torch f32"), ("eduba bf16", "torch bf16")):
            print("%-24s %10.2f %18.2f" % (f"{ours} / {theirs}", *(best[theirs] / best[ours])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
