"""nano_model.py against its definition and against transformers: python nano_model_test.py"""

import pathlib
import sys
import tempfile
import unittest

import torch

import nano_model
from cell_sentences import SINKS
from nano_model import BLOCK, WINDOW, Nano, attend, rotate

SEED = 20240617


def attend_slowly(q, k, v):
    """One query at a time, with the positions that a StreamingLLM cache would give its rows."""
    heads, length, width = q.shape[1:]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    out = torch.zeros_like(q)
    for i in range(length):
        rows = torch.tensor(sorted(set(range(min(SINKS, i + 1))) | set(range(max(0, i - WINDOW + 1), i + 1))))
        place = torch.arange(len(rows))  # Index in the cache: contiguous.
        scores = rotate(q[:, :, i:i + 1], place[-1:]) @ rotate(k[:, :, rows], place).transpose(-1, -2) * width ** -0.5
        out[:, :, i:i + 1] = scores.softmax(-1) @ v[:, :, rows]
    return out


class NanoModel(unittest.TestCase):
    def test_blocked_attention_is_the_cache_of_streaming_llm(self):
        torch.manual_seed(SEED)
        length = SINKS + 5 * BLOCK
        q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
        self.assertLess((attend(q, k, v) - attend_slowly(q, k, v)).abs().max(), 1e-9)

    def test_a_short_stream_is_a_llama(self):
        import transformers
        torch.manual_seed(SEED)
        model = Nano(101)
        for parameter in model.parameters():
            parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).bfloat16().float()
        ids = torch.randint(0, 101, (1, WINDOW))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save(pathlib.Path(folder))
            self.assertTrue(torch.equal(Nano.load(pathlib.Path(folder))(ids), model(ids)))
            llama, problems = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            self.assertFalse([v for v in problems.values() if v])
            want = llama(torch.nn.functional.pad(ids, (SINKS, 0), value=nano_model.SINK)).logits[:, SINKS:]
            got = model(ids) @ model.embed_tokens.weight.T
        self.assertLess((got - want).abs().max() / want.abs().max(), 1e-5)


if __name__ == "__main__":
    sys.exit(0 if unittest.main(exit=False).result.wasSuccessful() else 1)
