"""Writes tests/golden/models/<family>/: tiny random transformers, and what Hugging Face transformers computes with them.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch transformers safetensors numpy
    /tmp/venv/bin/python tests/golden/make_models.py [--out DIR] [FAMILY ...]

The same versions write the same bytes. README.md says what each file holds. The weights are drawn by numpy, not by
transformers' own initialisation, which leaves biases and norms trivial and logits flat: a loader that forgot a
norm's weight or a bias would pass.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import safetensors.numpy
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT = 80  # Well above every window here.
CONTINUATION = 200  # PROMPT + CONTINUATION lies beyond one page of 256 positions.
TAIL = 16

# The greedy continuation is a test of equality only where the best token leads by far more than any rounding:
# by MARGIN of the largest |logit| at every step, three times the tolerance below. Seeds are tried in order until one does.
MARGIN = 3e-4
DISTINCT = 16  # A continuation that runs in a short circle tests little.

# What an implementation in fp32 must keep: |got - logits_f64| <= TOLERANCE * max |logits_f64|.
TOLERANCE = 1e-4

# config.json as the family's published checkpoints write it (transformers 4); config_v5.json beside it is the same
# as transformers 5 writes it.
FAMILIES = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    # Frequencies on both sides of and between the two factors; heads wider than hidden_size / heads; tied head.
    "llama3_rope": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "sliding_window": 11,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    # Two global layers, then windows: Qwen2's max_window_layers counts the layers without one.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    # The window is named but switched off, as in every published Qwen.
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    },
    # The caps are small enough to bite at these logits.
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 12.0,
        "sliding_window": 12,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "float32",
    },
    # Seven layers: five local, one global, one local again.
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 9,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "float32",
    },
}


class InDouble(TorchFunctionMode):
    """Every float32 that the code inside asks for becomes a float64: transformers computes norms, softmax and rotary
    angles in float32 whatever the model's type is, and a reference should not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*[widen(a) for a in args], **{k: widen(v) for k, v in (kwargs or {}).items()})


def draw(name, shape, config, rng):
    """One tensor. Scales: activations stay near 1, scores and logits are a few units wide."""
    gemma = config["model_type"].startswith("gemma")
    tied = config.get("tie_word_embeddings", gemma)
    if "norm" in name:
        around = 0.0 if gemma or name.endswith(".bias") else 1.0
        if tied and name == "model.norm.weight":
            around += 2.0  # In place of the head's gain.
        return around + 0.2 * rng.standard_normal(shape)
    if len(shape) == 1:
        return 0.2 * rng.standard_normal(shape)
    if name.endswith(("lm_head.weight", "embed_out.weight")):
        gain = 3.0
    elif "embed_in" in name:
        gain = np.sqrt(shape[1])  # Without this GPT-NeoX's many biases weigh more than the token.
    elif "embed" in name:
        # Where the head is tied to it, a token that weighed more than what the layers add would repeat itself for ever.
        gain = 1.0
    elif any(part in name for part in ("q_proj", "k_proj", "query_key_value")):
        gain = 2.0 if config.get("attn_logit_softcapping") else 1.5
    else:
        gain = 1.0
    return gain / np.sqrt(shape[1]) * rng.standard_normal(shape)


def greedy(model, prompt):
    """The whole sequence, and the smallest lead of the best token over the second, as a share of the largest |logit|;
    the sequence ends early where that falls below MARGIN.
    Every step is a full forward: no cache whose correctness would have to be believed."""
    ids, least = list(prompt), np.inf
    for _ in range(CONTINUATION):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = torch.topk(logits, 2).values
        least = min(least, float((best[0] - best[1]) / logits.abs().max()))
        if least < MARGIN:
            break
        ids.append(int(torch.argmax(logits)))
    return np.array(ids), least


def load(folder, dtype):
    if dtype is torch.float32:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
        problems = {k: v for k, v in info.items() if v}
        assert not problems, f"{folder}: transformers did not take the tensors as they are: {problems}"
        return model.eval()
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    single = load(folder, torch.float32)
    model.load_state_dict({k: v.double() for k, v in single.state_dict().items()})
    for name, buffer in model.named_buffers():
        assert buffer.dtype is torch.float64, f"{name} is {buffer.dtype}"
    return model.eval()


def make(family, out):
    folder = out / family
    config = FAMILIES[family]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parsed = AutoConfig.from_pretrained(folder)
    shapes = {k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(parsed).named_parameters()}

    for seed in range(1000):
        rng = np.random.default_rng([seed, *family.encode()])
        weights = {k: draw(k, s, config, rng).astype(np.float32) for k, s in sorted(shapes.items())}
        prompt = rng.integers(0, config["vocab_size"], PROMPT)
        safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        single = load(folder, torch.float32)
        ids, least = greedy(single, prompt)
        print(f"{family}: seed {seed}: least lead {least:.1e}, {len(ids)} tokens, {len(set(ids[PROMPT:]))} different",
              file=sys.stderr, flush=True)
        if least >= MARGIN and len(set(ids[PROMPT:])) >= DISTINCT:
            break
    else:
        sys.exit(f"{family}: no seed gave a continuation that leads clearly")

    logits = single(torch.tensor(ids[None, :PROMPT]), use_cache=False).logits[0].numpy()
    with InDouble():
        double = load(folder, torch.float64)
        again, _ = greedy(double, prompt)
        all_double = double(torch.tensor(ids[None]), use_cache=False, output_hidden_states=True)
    assert (again == ids).all(), f"{family}: float32 and float64 continue differently"
    logits_f64 = all_double.logits[0].numpy()
    assert logits_f64.dtype == np.float64
    hidden = all_double.hidden_states[-1][0, :PROMPT].numpy()

    np.save(folder / "ids.npy", ids[:PROMPT].astype(np.int32))
    np.save(folder / "continuation.npy", ids[PROMPT:].astype(np.int32))
    np.save(folder / "logits.npy", logits)
    np.save(folder / "logits_f64.npy", logits_f64[:PROMPT].astype(np.float32))
    np.save(folder / "tail_logits_f64.npy", logits_f64[-TAIL:].astype(np.float32))
    np.save(folder / "hidden_mean_f64.npy", hidden.mean(axis=0).astype(np.float32))
    (folder / "config_v5.json").write_text(parsed.to_json_string())
    scale = np.abs(logits_f64[:PROMPT]).max()
    error = np.abs(logits - logits_f64[:PROMPT]).max() / scale
    golden = {
        "made_by": "tests/golden/make_models.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "seed": seed,
        "tolerance": TOLERANCE,
        "tolerance_means": "max |got - logits_f64| <= tolerance * max |logits_f64|",
        "transformers_float32_error": float(f"{error:.2g}"),
        "largest_logit": float(f"{scale:.4g}"),
        "greedy_least_lead": float(f"{least:.3g}"),
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=2) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{family}: seed {seed}, {size} bytes, float32 error {error:.1e}, logits to {scale:.1f} (std {logits.std():.2f}), "
          f"least lead {least:.1e}, {len(set(ids[PROMPT:]))} tokens of {config['vocab_size']} in the continuation", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "models")
    parser.add_argument("families", nargs="*", help="of " + " ".join(FAMILIES))
    args = parser.parse_args()
    torch.set_num_threads(1)  # One order of summation.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.inference_mode():
        for family in args.families or FAMILIES:
            make(family, args.out)


if __name__ == "__main__":
    main()
