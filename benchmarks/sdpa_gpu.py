"""PyTorch's scaled_dot_product_attention on this machine's GPU, in the shapes of `eduba bench attend --device cuda:0`, to stand beside it.

    PYTHON benchmarks/sdpa_gpu.py          (a Python with torch for CUDA)

Prefill of 32 Ki positions, causal, 32 query heads on 8 KV heads, head_dim 128, bf16, once with each backend of PyTorch that takes it (cuDNN, flash);
then the same with a window of 4096 through flex_attention, where torch.compile works. Prints Tflop/s: 4 * head_dim operations for each query head and
visible pair, medians of 9 rounds. Exits with 3, and says SKIPPED, where torch or its GPU is missing."""

import statistics
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    print(f"SKIPPED, NOT TESTED: torch: {error}")
    sys.exit(3)

POSITIONS, QUERY_HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32 << 10, 32, 8, 128, 4096
ROUNDS = 9


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


def report(name, pairs, call):
    """One line; a backend that does not take the shape says why instead."""
    try:
        taken = seconds(call)
    except (RuntimeError, ImportError) as error:
        print(f"{name}: SKIPPED, NOT TESTED: {str(error).splitlines()[0]}")
        return
    rate = 4 * HEAD_DIM * QUERY_HEADS * pairs / taken / 1e12
    print(f"{name}: {taken * 1e3:.3f} ms, {rate:.1f} Tflop/s")


def main():
    if not torch.cuda.is_available():
        print("SKIPPED, NOT TESTED: torch finds no GPU")
        sys.exit(3)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    make = lambda heads: torch.randn(1, heads, POSITIONS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    query, key, value = make(QUERY_HEADS), make(KV_HEADS), make(KV_HEADS)
    causal = POSITIONS * (POSITIONS + 1) // 2
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            report(
                f"sdpa {name}, causal",
                causal,
                lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
            )

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    outside = POSITIONS - WINDOW
    windowed = causal - outside * (outside + 1) // 2
    visible = lambda b, h, q, k: (k <= q) & (k > q - WINDOW)  # noqa: E731
    mask = create_block_mask(visible, None, None, POSITIONS, POSITIONS, device="cuda")
    flex = torch.compile(flex_attention)
    report(f"flex_attention, window {WINDOW}", windowed, lambda: flex(query, key, value, block_mask=mask, enable_gqa=True))


if __name__ == "__main__":
    main()
