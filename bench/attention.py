"""Our written-out attention against torch's fused kernel, forwards and backwards, at the lengths of RLHF.

.venv/bin/python bench/attention.py
"""

import os
import platform
import statistics
import time

import torch

from accord.nn.attention import _Attend, fused_attend_rows

HEADS, GROUPS, WIDTH, ROUNDS = 9, 3, 64, 15  # SmolLM2-135M


def written_out(query, key, value):
    return _Attend.apply(query, key, value, None)


def seconds(form, batch, length, dtype):
    tensors = [torch.randn(batch, n, length, WIDTH, dtype=dtype, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]
    start = time.perf_counter()
    out = form(*tensors)
    middle = time.perf_counter()
    out.sum().backward()
    return middle - start, time.perf_counter() - middle


def main():
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}; medians of {ROUNDS}, alternating\n")
    print("| rows x tokens | dtype | written out: forward, backward (ms) | fused | fused / written out |\n|---|---|---|---|---|")
    for batch, length in ((16, 64), (32, 96), (16, 192), (8, 256), (4, 512)):
        for dtype in (torch.bfloat16, torch.float32):
            found = {form: [] for form in (written_out, fused_attend_rows)}
            for _ in range(ROUNDS + 2):
                for form, values in found.items():
                    values.append(seconds(form, batch, length, dtype))
            (a, b), (c, d) = ([1e3 * statistics.median(v[i] for v in values[2:]) for i in (0, 1)] for values in found.values())
            print(f"| {batch} x {length} | {str(dtype)[6:]} | {a:.1f}, {b:.1f} | {c:.1f}, {d:.1f} | {(c + d) / (a + b):.2f} |")


if __name__ == "__main__":
    main()
