"""PyTorch's and FlashInfer's attention on this machine's GPU, in the shapes of `eduba bench attend --device cuda:0`, to stand beside it.

    PYTHON benchmarks/sdpa_gpu.py          (a Python with torch for CUDA)

Prefill of 32 Ki positions, 32 query heads on 8 KV heads, head_dim 128, bf16 and f16. Causal: scaled_dot_product_attention with its cuDNN and flash
backends, FlashInfer. With a window of 4096: flex_attention, compiled, with our mask (the window, and the first 4 positions always); FlashInfer
without the first 4. Prints Tflop/s: 4 * head_dim operations for each query head and visible pair, medians of 9 rounds. What this machine lacks is
a line that says SKIPPED; exits with 3 where nothing was measured."""

import statistics
import sys

try:
    import torch
except ImportError as error:
    print(f"SKIPPED, NOT TESTED: torch: {error}")
    sys.exit(3)

POSITIONS, QUERY_HEADS, KV_HEADS, HEAD_DIM, WINDOW, SINKS = 32 << 10, 32, 8, 128, 4096, 4
ROUNDS = 9
CAUSAL_PAIRS = POSITIONS * (POSITIONS + 1) // 2
WINDOW_PAIRS = CAUSAL_PAIRS - (POSITIONS - WINDOW) * (POSITIONS - WINDOW + 1) // 2
SINK_PAIRS = sum(min(SINKS, q + 1 - WINDOW) for q in range(WINDOW, POSITIONS))  # Beside the window.


def seconds(call):
    call()
    taken = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def report(name, pairs, make):
    """One line, and whether it is a rate: `make` imports what it needs and returns the call to time. Libraries that are missing, old, or unable to
    compile for this GPU raise anything."""
    try:
        taken = seconds(make())
    except Exception as error:  # pylint: disable=broad-except
        why = str(error).splitlines() or [""]
        print(f"{name}: SKIPPED, NOT TESTED: {type(error).__name__}: {why[0]}", flush=True)
        return False
    rate = 4 * HEAD_DIM * QUERY_HEADS * pairs / taken / 1e12
    print(f"{name}: {taken * 1e3:.3f} ms, {rate:.1f} Tflop/s", flush=True)
    return True


def sdpa(backend, query, key, value):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = getattr(SDPBackend, backend)

    def call():
        with sdpa_kernel(chosen):
            scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return call


def flex(query, key, value):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_batch, _head, q, k):
        return (k <= q) & ((k > q - WINDOW) | (k < SINKS))

    mask = create_block_mask(visible, None, None, POSITIONS, POSITIONS, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def flashinfer(window, query, key, value):
    from flashinfer import single_prefill_with_kv_cache

    # Positions before heads; its window is that of the keys to the left.
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    return lambda: single_prefill_with_kv_cache(*rows, causal=True, window_left=window - 1 if window else -1)


def main():
    if not torch.cuda.is_available():
        print("SKIPPED, NOT TESTED: torch finds no GPU")
        sys.exit(3)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    measured = False
    for dtype, element in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        inputs = [torch.randn(1, heads, POSITIONS, HEAD_DIM, device="cuda", dtype=element) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
        for name, pairs, make in (
            ("sdpa cudnn, causal", CAUSAL_PAIRS, lambda inputs: sdpa("CUDNN_ATTENTION", *inputs)),
            ("sdpa flash, causal", CAUSAL_PAIRS, lambda inputs: sdpa("FLASH_ATTENTION", *inputs)),
            (f"flex_attention, window {WINDOW} and {SINKS} sinks", WINDOW_PAIRS + SINK_PAIRS, lambda inputs: flex(*inputs)),
            ("flashinfer, causal", CAUSAL_PAIRS, lambda inputs: flashinfer(0, *inputs)),
            (f"flashinfer, window {WINDOW}", WINDOW_PAIRS, lambda inputs: flashinfer(WINDOW, *inputs)),
        ):
            measured |= report(f"{name}, {dtype}", pairs, lambda make=make, inputs=inputs: make(inputs))
    if not measured:
        print("SKIPPED, NOT TESTED: none of these could be measured")
        sys.exit(3)


if __name__ == "__main__":
    main()
