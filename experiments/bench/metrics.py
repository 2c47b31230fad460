"""Seconds and memory of the pixel metrics of n maps, made one at a time, and what binning costs."""

import argparse
import threading
import time
from collections.abc import Iterator

import numpy as np

SIZE = 224
BOUNDED = ("auroc", "average_precision", "aupro")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--maps", type=int, nargs="+", default=[748, 10_000])
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict:
    """Each number of maps in turn; the growth of the process's memory, not its whole size."""
    from medclip_jax.evaluation import pixel_metrics
    from medclip_jax.evaluation.ranking import PixelRanks

    pixel_metrics.pixel_level(Scenes(2, args.seed, 0), Scenes(2, args.seed, 1))  # imports
    rows = []
    for n in args.maps:
        both = [Scenes(n, args.seed, part) for part in (0, 1)]
        begin = time.perf_counter()
        made = sum(len(one) for pair in zip(*both, strict=True) for one in pair)
        making = time.perf_counter() - begin
        with Growth() as memory:
            begin = time.perf_counter()
            found = pixel_metrics.pixel_level(*both)
            seconds = time.perf_counter() - begin - making * 1.5  # maps are read twice, masks once
        ranks = PixelRanks(0.0, 1.0)
        for values, mask in zip(*(Scenes(min(n, 100), args.seed, p) for p in (0, 1)), strict=True):
            ranks.add(values, mask)
        row = {"maps": n, "rows_made": made, "seconds": seconds, "grown_mb": memory.peak / 1e6}
        row |= {name: found[name] for name in ("auroc", "aupro", "dice")}
        for name in BOUNDED:
            row[f"{name}_error_at_most"] = getattr(ranks, f"{name}_error")()
        rows.append(row)
        bounds = [f"{name} {row[f'{name}_error_at_most']:.1e}" for name in BOUNDED]
        print(
            f"{n} maps of {SIZE} x {SIZE}: {seconds:.1f} s beside {making * 1.5:.1f} s of making "
            f"them, memory grew by {row['grown_mb']:.0f} MB; binning changes at most "
            f"{', '.join(bounds)}",
            flush=True,
        )
    return {"rows": rows}


class Scenes:
    """n smooth maps (part 0, float16 as a run stores them) or masks (part 1), made when read."""

    def __init__(self, n: int, seed: int, part: int):
        self.n, self.seed, self.part = n, seed, part
        y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
        self.place = y, x

    def __iter__(self) -> Iterator[np.ndarray]:
        y, x = self.place
        for i in range(self.n):
            rng = np.random.default_rng([self.seed, i])
            at, wide = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.3, 2)
            far = ((y - at[0]) / wide[0]) ** 2 + ((x - at[1]) / wide[1]) ** 2
            if self.part:
                yield far < 1 if i % 7 else np.zeros(far.shape, bool)
            else:
                off = rng.normal(0, 0.05, far.shape).astype(np.float32)
                yield np.clip(0.3 + off + 0.4 * np.exp(-far / 2), 0, 0.999).astype(np.float16)


class Growth:
    """How much the resident memory rises above its start while the block runs, bytes (Linux)."""

    def __enter__(self) -> "Growth":
        self.start, self.peak, self.over = resident(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.05):
            self.peak = max(self.peak, resident() - self.start)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()


def resident() -> int:
    """Bytes this process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
