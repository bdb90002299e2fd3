"""Writes the seeds of the fuzz targets under corpus/: /usr/bin/python3 tests/fuzz/make_corpus.py"""

import io
import json
import pathlib
import random
import struct

import numpy

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"


def npy_seeds():
    arrays = {
        "f32": numpy.arange(6, dtype="<f4").reshape(2, 3),
        "f16": numpy.arange(2, dtype="<f2").reshape(1, 2, 1),
        "i64": numpy.array([3, 1, 9]),
        "mask": numpy.arange(10) % 3 == 0,
        "scalar": numpy.float64(1.5),
        "empty": numpy.zeros((0, 4), dtype="<u2"),
        "fortran": numpy.asfortranarray(numpy.ones((2, 2), dtype="<i4")),
        "big_endian": numpy.ones(2, dtype=">f4"),
        "records": numpy.zeros(1, dtype=[("a", "<f4")]),
        "text": numpy.array(["ab"]),
    }
    for name, array in arrays.items():
        out = io.BytesIO()
        numpy.save(out, array)
        yield name, out.getvalue()
    out = io.BytesIO()
    numpy.lib.format.write_array(out, arrays["f32"], version=(2, 0))
    yield "version2", out.getvalue()


def h5ad_seeds():
    """The target reads decisions from the bytes, so seeds are bytes: random ones of the length that a whole file takes."""
    generator = random.Random(1)
    for i in range(8):
        yield f"random{i}", generator.randbytes(600)


def request_seeds():
    """As for h5ad_fuzz: each byte is a decision."""
    generator = random.Random(2)
    for i in range(8):
        yield f"random{i}", generator.randbytes(400)
    # Session s0 as it is; plan 8 positions, commit, ask a query of one row, finish.
    yield "life", bytes([0, 3, 0, 0, 8, 16, 1, 0, 8, 9, 5, 1, 1, 6, 0, 1, 1, 1, 7, 1, 8, 1] + [0] * 16 + [9, 0])


def config_json_seeds():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    small = {
        "llama": {"num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
        "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"num_key_value_heads": None, "head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                               "rope_theta": 1e6}},
        "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": False, "eos_token_id": 0},
        "gemma2": {"query_pre_attn_scalar": 144, "attn_logit_softcapping": None, "hidden_act": "gelu_pytorch_tanh"},
        "gemma3_text": {"sliding_window_pattern": 2, "rope_local_base_freq": 1e4, "layer_types": None, "eos_token_id": [1, 2]},
    }
    for model_type, fields in small.items():
        yield model_type, json.dumps({"model_type": model_type, **sizes, **fields}).encode()


def safetensors_seeds():
    def file(header, data, align=8):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % align)
        return struct.pack("<Q", len(text)) + text + data

    two = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
           "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}}
    yield "two", file({"__metadata__": {"format": "pt"}, **two}, bytes(range(14)))
    yield "unaligned", file(two, bytes(range(14)), align=1)
    yield "scalar", file({"s": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, bytes(8))
    yield "none", file({}, b"")


def tokenizer_json_seeds():
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "abc", "<unk>", "▁", "▁a", "<0xC3>", "<0xA9>", "Ġ"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"], ["▁", "a"]]}
    special = {"id": 11, "content": "<s>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    plain = {"id": 12, "content": "é", "rstrip": True, "normalized": True, "special": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [11], "tokens": ["<s>"]}}}

    def file(**parts):
        return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special, plain],
                           "normalizer": None, "pre_tokenizer": None, "post_processor": template, "decoder": byte_level,
                           "model": model, **parts}, ensure_ascii=False).encode()

    pattern = r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"},
                                                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    yield "gpt2", file(pre_tokenizer=byte_level)
    yield "llama3", file(normalizer={"type": "NFC"}, model={**model, "ignore_merges": True},
                         pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]})
    yield "llama2", file(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]},
                         decoder=decoder, model={**model, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True})
    yield "metaspace", file(decoder=decoder, pre_tokenizer={"type": "Metaspace", "replacement": "▁",
                                                            "prepend_scheme": "first", "split": True})


TARGETS = {"npy_fuzz": npy_seeds(), "h5ad_fuzz": h5ad_seeds(), "request_fuzz": request_seeds(),
           "config_json_fuzz": config_json_seeds(), "safetensors_fuzz": safetensors_seeds(),
           "tokenizer_json_fuzz": tokenizer_json_seeds()}
for target, seeds in TARGETS.items():
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds:
        (folder / name).write_bytes(content)
