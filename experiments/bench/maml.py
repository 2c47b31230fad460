"""Seconds and memory of one meta-step: exact, first order, ANIL and joint; inner steps; K."""

import argparse

from bench import workload

LEARNERS = {"exact": "maml", "first order": "fomaml", "anil": "anil", "joint": "joint"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", nargs="+", default=["ViT-B/16"], choices=workload.SIZES)
    parser.add_argument("--k", type=int, nargs="+", default=[4], help="rows of support and query")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1])
    parser.add_argument("--learner", nargs="+", default=list(LEARNERS), choices=LEARNERS)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)


def run(args: argparse.Namespace) -> dict:
    rows = []
    for tower in args.tower:
        for k in args.k:
            rows += measured(tower, k, args)
    return {"rows": rows}


def measured(tower: str, k: int, args: argparse.Namespace) -> list[dict]:
    """All learners and inner steps of one size, timed in turn."""
    work = workload.build(tower, args.tasks, k)
    steps, runs = {}, {}
    for label in args.learner:
        for count in args.inner_steps if label != "joint" else [0]:
            compiled, state = workload.step(work, LEARNERS[label], count)
            steps[label, count] = compiled
            runs[label, count] = workload.Runner(work, compiled, state)
    seconds = workload.in_turn(runs, args.times, again=True)
    peak = workload.matmul_peak()
    rows = []
    for (label, count), compiled in steps.items():
        best = min(seconds[label, count])
        operations = workload.operations(work, LEARNERS[label], count, compiled)
        row = {
            "tower": tower,
            "k": k,
            "tasks": args.tasks,
            "learner": label,
            "inner_steps": count,
            "seconds": best,
            "all_seconds": seconds[label, count],
            "episodes_per_second": args.tasks / best,
            "peak_megabytes": workload.peak_memory(compiled) / 2**20,
            "temporary_megabytes": workload.temporary_memory(compiled) / 2**20,
            "gigaflop": operations / 1e9,
            "share_of_matmul_peak": operations / best / peak,
        }
        rows.append(row)
        print(
            f"{tower} K={k} {label:11} {count} inner: {best:6.2f} s, "
            f"{row['peak_megabytes']:6.0f} MB, {row['gigaflop']:5.0f} GFLOP, "
            f"{row['share_of_matmul_peak']:.0%} of {peak / 1e9:.0f} GFLOP/s",
            flush=True,
        )
    print_ratios(rows)
    return rows


def print_ratios(rows: list[dict]) -> None:
    """Exact against first order, and memory against one inner step."""
    by = {(r["learner"], r["inner_steps"]): r for r in rows}
    for (label, count), row in by.items():
        if label == "exact" and ("first order", count) in by:
            ratio = row["seconds"] / by["first order", count]["seconds"]
            print(f"  exact / first order, {count} inner: {ratio:.2f} x the time")
        if label != "joint" and count > 1 and (label, 1) in by:
            ratio = row["peak_megabytes"] / by[label, 1]["peak_megabytes"]
            print(f"  {label}, {count} / 1 inner steps: {ratio:.2f} x the memory")
