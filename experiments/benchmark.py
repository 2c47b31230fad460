"""Measure this machine: encoder, meta-step, stages of a job, prediction, scaling over devices.

python experiments/benchmark.py COMMAND [--json FILE] [--help]

Run it from a checkout in which medclip_jax is installed. Times are the best of a few repetitions,
taken in turn, so that what else the machine does falls on all sides alike: read the ratios. On
Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command makes large steps faster on a CPU;
the JSON says whether it was set, and workers inherit it.
"""

import argparse
import importlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import command

from medclip_jax import files

COMMANDS = ("encoder", "large", "maml", "stages", "predict", "scaling", "input", "table")  # bench's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"bench.{name}") for name in COMMANDS}
    for name, module in modules.items():
        one = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        one.add_argument("--json", type=Path, help="file for the result")
        one.register("type", int, command.count)  # what benchmarks call int is a count
        one.register("type", float, command.positive)
        module.arguments(one)
    args = parser.parse_args()
    own = {name: value for name, value in vars(args).items() if name not in ("json", "command")}
    about = {"command": args.command, "arguments": own, "machine": machine()}
    result = about | modules[args.command].run(args)
    if args.json:
        files.write_json(args.json, result)


def machine() -> dict:
    """What the numbers depend on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "jax": version("jax"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    command.run(main)
