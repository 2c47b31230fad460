"""Seconds and memory of one meta-step: exact, first order, ANIL and joint; inner steps; K."""

import argparse

from bench import clock, sizes, workload

LEARNERS = {"exact": "maml", "first order": "fomaml", "anil": "anil", "joint": "joint"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", default=["ViT-B/16"], choices=sizes.SIZES)
    parser.add_argument("--k", type=int, nargs="+", default=[4], help="rows of support and query")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1])
    parser.add_argument("--learner", nargs="+", default=list(LEARNERS), choices=LEARNERS)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)


def run(args: argparse.Namespace) -> dict:
    return {"rows": [r for size in args.size for k in args.k for r in measure(size, k, args)]}


def measure(size: str, k: int, args: argparse.Namespace) -> list[dict]:
    """All learners and inner steps of one size, timed in turn."""
    work = workload.build(size, args.tasks, k)
    steps, runs = {}, {}
    for label in args.learner:
        for count in args.inner_steps if label != "joint" else [0]:
            compiled, state = workload.step(work, LEARNERS[label], count)
            steps[label, count] = compiled
            runs[label, count] = workload.Runner(work, compiled, state)
    seconds = clock.in_turn(runs, args.times, again=True)
    peak = clock.matmul_peak()
    about = {"size": size, "k": k, "tasks": args.tasks}
    rows = []
    for (label, count), times in seconds.items():
        row = about | {"learner": label, "inner_steps": count, "seconds": min(times)}
        row |= {"all_seconds": times, "episodes_per_second": args.tasks / min(times)}
        row |= counted(work, LEARNERS[label], count, steps[label, count], min(times) * peak)
        rows.append(row)
        shown = {n: x for n, x in row.items() if n not in about and n != "all_seconds"}
        print(size, f"K={k}", *(f"{n} {x:.4g}" if n != "learner" else x for n, x in shown.items()))
    return rows


def counted(work, learner: str, inner_steps: int, compiled, possible: float) -> dict:
    """Memory and operations of a step; `possible`: operations that its time would allow."""
    peak, temporary = workload.memory(compiled)
    operations = workload.operations(work, learner, inner_steps, compiled)
    return {
        "peak_megabytes": peak / 2**20,
        "temporary_megabytes": temporary / 2**20,
        "gigaflop": operations / 1e9,
        "share_of_matmul_peak": operations / possible,
    }
