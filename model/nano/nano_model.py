"""The model in plain PyTorch: Hugging Face's Llama, but attention sees the sinks and the last WINDOW tokens, as StreamingLLM.

Query i sees the keys {j < SINKS} and {i - WINDOW < j <= i}. Rotary positions are rolling: among tokens of the window
only distances count, and the sinks are seen from index min(i, SINKS + WINDOW - 1), so that nothing grows with the length
of the stream. Up to SINKS + WINDOW tokens this is Llama as it is (nano_model_test.py compares with transformers).
"""

import json

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from cell_sentences import SINK, SINKS

WINDOW = 256
BLOCK = 128  # Queries that share their keys; divides WINDOW.

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": None,  # By the atlas.
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": SINKS + WINDOW,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def rotate(x, positions):
    """Rotary embedding of x [..., tokens, width] at positions [tokens]; angles in double, halves as Llama has them."""
    half = x.shape[-1] // 2
    frequencies = CONFIG["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q, k, v):
    """q [batch, heads, SINKS + tokens, width] and k, v with fewer heads, not rotated yet; tokens a multiple of BLOCK."""
    batch, heads, length, width = q.shape
    tokens, back = length - SINKS, WINDOW
    positions = torch.arange(length)
    q_sink = rotate(q, positions.clamp(max=SINKS + WINDOW - 1)) * width ** -0.5
    q, k = rotate(q, positions) * width ** -0.5, rotate(k, positions)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))

    sinks = functional.scaled_dot_product_attention(
        q[:, :, :SINKS], k[:, :, :SINKS], v[:, :, :SINKS], is_causal=True, scale=1.0)

    def keys_of_blocks(x):  # [batch, heads, blocks, width, back + BLOCK]
        return functional.pad(x[:, :, SINKS:], (0, 0, back, 0)).unfold(2, back + BLOCK, BLOCK)

    def queries(x):  # [batch, heads, blocks, BLOCK, width]
        return x[:, :, SINKS:].reshape(batch, heads, tokens // BLOCK, BLOCK, width)

    row, column = torch.arange(BLOCK)[:, None], torch.arange(back + BLOCK) - back
    distance = row - column
    seen = ((distance >= 0) & (distance < WINDOW)) & (column + BLOCK * torch.arange(tokens // BLOCK)[:, None, None] >= 0)
    near = (queries(q) @ keys_of_blocks(k)).masked_fill(~seen, -torch.inf)
    far = queries(q_sink) @ k[:, :, None, :SINKS].transpose(-1, -2)
    weights = torch.softmax(torch.cat([far, near], dim=-1), dim=-1)
    out = weights[..., SINKS:] @ keys_of_blocks(v).transpose(-1, -2) + weights[..., :SINKS] @ v[:, :, None, :SINKS]
    return torch.cat([sinks, out.reshape(batch, heads, tokens, width)], dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.width = c["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], c["num_attention_heads"] * self.width, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * self.width, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * self.width, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * self.width, c["hidden_size"], bias=False)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Nano(nn.Module):
    """Names of parameters are Hugging Face's, less the leading "model."."""

    def __init__(self, vocab_size):
        super().__init__()
        self.config = {**CONFIG, "vocab_size": vocab_size}
        self.embed_tokens = nn.Embedding(vocab_size, CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer(CONFIG) for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])

    def forward(self, ids):
        """ids int64 [batch, tokens], without the sinks -> hidden states after the last norm [batch, tokens, hidden_size],
        without the sinks'. Logits are hidden @ embed_tokens.weight.T."""
        batch, tokens = ids.shape
        ids = functional.pad(ids, (SINKS, -tokens % BLOCK), value=SINK)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)[:, SINKS:SINKS + tokens]

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v.detach().bfloat16().contiguous() for k, v in sorted(self.state_dict().items())}
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        streaming = {"policy": "streaming", "sink_token_id": SINK, "sink_tokens": SINKS, "window": WINDOW, "positions": "rolling"}
        (folder / "streaming.json").write_text(json.dumps(streaming, indent=2) + "\n")

    @staticmethod
    def load(folder):
        """The saved bf16 weights, computing in fp32."""
        model = Nano(json.loads((folder / "config.json").read_text())["vocab_size"])
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        model.load_state_dict({k.removeprefix("model."): v.float() for k, v in tensors.items()})
        return model.eval()
