"""What got slower between two measurements: python experiments/compare_speed.py OLD.json NEW.json

The files are those of `experiments/benchmark.py quick --json FILE`. Every number under "seconds"
is compared, by its name; with one that is more than 1.2 times the old one the exit code is 1.
Measure both on one machine that does nothing else.
"""

import argparse
import json
import math
import sys
from pathlib import Path

LIMIT = 1.2


def slower(old: dict[str, float], new: dict[str, float], limit: float) -> dict[str, float]:
    """Name -> how many times the old seconds, of what is above the limit.

    Raises ValueError if a name of the old file is not in the new one, or a number is no time.
    """
    if lost := sorted(set(old) - set(new)):
        raise ValueError(f"not measured any more: {', '.join(lost)}")
    for name in old:
        if not (old[name] > 0 and new[name] > 0 and math.isfinite(old[name] + new[name])):
            raise ValueError(f"{name}: {old[name]} and {new[name]} are not both seconds above 0")
    times = {name: new[name] / old[name] for name in old}
    return {name: ratio for name, ratio in times.items() if ratio > limit}


def seconds(path: Path) -> dict[str, float]:
    """The measured seconds of a file. Raises ValueError if it holds none."""
    try:
        found = json.loads(path.read_text())["seconds"]
        return {name: float(value) for name, value in found.items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of benchmark.py quick ({error!r})") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=LIMIT, help="times the old seconds")
    args = parser.parse_args()
    try:
        old, new = seconds(args.old), seconds(args.new)
        found = slower(old, new, args.limit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in old:
        mark = " SLOWER" if name in found else ""
        print(
            f"{name:20} {old[name]:10.4f} s {new[name]:10.4f} s {new[name] / old[name]:6.2f}{mark}"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
