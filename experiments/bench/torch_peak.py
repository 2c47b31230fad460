"""Matrix products in PyTorch: python torch_peak.py '[[SIDE, ...], TIMES]' prints one JSON line."""

import json
import os
import sys
import time

import torch


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sides, times = json.loads(sys.argv[1])
    print(json.dumps({t: rates(getattr(torch, t), sides, times) for t in ("float32", "bfloat16")}))


def rates(dtype: torch.dtype, sides: list[int], times: int) -> dict[str, float]:
    """1e9 operations per second by side of the square matrices."""
    found = {}
    for n in sides:
        a = torch.randn(n, n).to(dtype)
        a @ a
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - begin)
        found[str(n)] = 2 * n**3 / min(seconds) / 1e9
    return found


if __name__ == "__main__":
    main()
