"""Prints the figures of `eduba bench attend --device cuda:0 --json` as a table.

    python3 tests/gpu/attend_table.py FIGURES.json COMPUTE_CAPABILITY

Ends with 1 where the rate of bf16 products, the ceiling of batches, was not measured with cuBLAS on a GPU of compute capability 9: mma.sync reaches
about 0.6 of what its warpgroups multiply, and shares of that would flatter."""

import json
import sys


def row(r):
    batch = r["query_rows"] > 1
    return [
        r["backend"], r["queries_per_kv_head"], r["query_rows"], f"{r['keys']:.0f}", r["dtype"], r["query_dtype"],
        f"{r['seconds'] * 1e3:.3f}", f"{r['kernel_seconds'] * 1e3:.3f}", f"{r['gb_per_s']:.0f}", f"{r['stream_gb_per_s']:.0f}",
        f"{r['share']:.2f}", f"{r['kernel_share']:.2f}",
        *([f"{r['gflops'] / 1e3:.1f}", f"{r['matrix_gflops'] / 1e3:.1f} {r['matrix_dtype']}", f"{r['matrix_share']:.2f}",
           f"{r['kernel_matrix_share']:.2f}"] if batch else [""] * 4)]


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        results = json.load(file)
    table = [["backend", "queries/kv", "rows", "keys", "dtype", "queries", "ms", "kernel ms", "GB/s", "copy GB/s", "share", "of the kernel",
              "Tflop/s", "ceiling", "share", "of the kernel"], *map(row, results)]
    widths = [max(len(str(line[i])) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())
    ceilings = {r["matrix_dtype"] for r in results if r["query_rows"] > 1}
    if sys.argv[2].startswith("9.") and ceilings - {"bf16 cuBLAS"}:
        print(f"the ceiling of batches is {', '.join(sorted(ceilings))}, wanted cuBLAS: libcublas was not found; pip install nvidia-cublas, or name its "
              "folder in LD_LIBRARY_PATH. The shares of it are too high")
        sys.exit(1)


if __name__ == "__main__":
    main()
