"""Episodes per second on 1, 2, 4 and 8 devices; on a CPU they share its cores."""

import argparse
import json
import sys

from bench import clock, sizes, workload


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--size", default="ViT-B/16", choices=sizes.SIZES)
    parser.add_argument("--k", type=int, default=4, help="rows of support and query")
    parser.add_argument("--learner", default="anil", choices=["maml", "fomaml", "anil"])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--times", type=int, default=3)


def run(args: argparse.Namespace) -> dict:
    """Each number of devices in a process of its own: JAX fixes it at its start."""
    rows = []
    for count in args.devices:
        given = [count, args.size, args.k, args.learner, args.tasks, args.times]
        row = clock.alone("bench.scaling", *given)
        first = rows[0]["episodes_per_second"] if rows else row["episodes_per_second"]
        row["relative"] = row["episodes_per_second"] / first
        rows.append(row)
        print(
            f"{row['devices']} device(s), {row['platform']}: "
            f"{row['episodes_per_second']:.2f} episodes/s, {row['relative']:.2f} x the first",
            flush=True,
        )
    return {"rows": rows}


def worker(count: int, size: str, k: int, learner: str, tasks: int, times: int) -> dict:
    """Seconds per step with `tasks` spread over `count` devices."""
    import jax

    # has a say on a CPU only; where there are accelerators, the first `count` are taken
    jax.config.update("jax_num_cpu_devices", count)
    from medclip_jax.distributed import sharding

    devices = jax.devices()
    if len(devices) < count:
        raise SystemExit(f"{count} devices wanted, {len(devices)} available")
    mesh = sharding.mesh(devices[:count])
    work = workload.build(size, tasks, k)
    episodes, valid = sharding.spread(work.episodes, mesh)
    episodes = episodes._replace(valid=episodes.valid & valid[:, None])
    work = work._replace(episodes=episodes, frozen=sharding.replicate(work.frozen, mesh))
    runner = workload.Runner(work, *workload.step(work, learner, 1, mesh=mesh))
    seconds = [runner() for _ in range(times + 1)]
    about = {"devices": count, "platform": devices[0].platform, "learner": learner}
    about |= {"tasks": tasks, "seconds": seconds[1:]}
    return about | {"episodes_per_second": tasks / min(seconds[1:])}


if __name__ == "__main__":
    count, size, k, learner, tasks, times = sys.argv[1:]
    print(json.dumps(worker(int(count), size, int(k), learner, int(tasks), int(times))))
