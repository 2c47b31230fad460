"""A hospital network's day in front of a fleet that scores images: waits, queue, lost workers.

python experiments/hospital.py [--images 10e6] [--rate 4.0 --price 0.10] [--wait 60] [--seed 0]

Images come by the hour as people work, with bursts (an archive that is sent at once). Workers take
images in order of arrival, each at a constant rate; a worker that is lost loses the batch in its
hands, which goes back in front, and another stands in for it after a while. Seconds are the steps;
what is printed is the smallest fleet with which 99% of the images wait no longer than asked,
without and with losses, and what a day costs. Rates and prices are given, not measured here; those
of docs/scaling.md say where they come from.
"""

import argparse
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

DAY = 86_400
# share of the day's images by hour, before it is normed: little at night, most before noon
HOURS = (1, 1, 1, 1, 1, 2, 4, 7, 10, 11, 11, 10, 8, 9, 10, 9, 8, 6, 4, 3, 3, 2, 2, 1)

HEAD = ("images/s", "wait asked, s", "losses", "workers", "median, 99%, longest wait, s")
HEAD += ("longest queue", "busy", "lost", "computed twice", "price of a million images")


class Load(NamedTuple):
    """What comes in one day."""

    images: float = 10e6
    bursts: int = 12  # a day, at random moments
    burst_images: float = 20_000  # of each, beside the `images` of the day
    burst_seconds: int = 60


class Losses(NamedTuple):
    """How workers are lost."""

    mean_hours: float = 24.0  # between two losses of one worker, as of preemptible machines
    seconds_away: int = 300  # until another one has started and loaded its scorer
    batch: int = 32  # images in the hands of a worker


class Day(NamedTuple):
    """What a day was like."""

    median_wait: float  # seconds
    wait_99: float
    longest_wait: float
    longest_queue: float  # images
    busy: float  # share of the workers' time
    lost: int  # workers
    again: float  # share of the images that were computed twice


def arrivals(load: Load, rng: np.random.Generator) -> Int[np.ndarray, " t"]:
    """Images of every second, Poisson around the hours' rates."""
    share = np.repeat(np.array(HOURS) / sum(HOURS) / 3600, 3600)
    rate = load.images * share
    for begin in rng.integers(DAY - load.burst_seconds, size=load.bursts):
        rate[begin : begin + load.burst_seconds] += load.burst_images / load.burst_seconds
    return rng.poisson(rate)


def staff(
    workers: int, losses: Losses | None, seconds: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """(workers at work, workers lost) in every second."""
    there, gone = np.full(seconds, workers), np.zeros(seconds, int)
    if losses is None:
        return there, gone
    chance, back = 1 / (3600 * losses.mean_hours), np.zeros(seconds + losses.seconds_away, int)
    now = workers
    for t in range(seconds):
        now += back[t]
        gone[t] = rng.binomial(now, chance)
        now -= gone[t]
        back[t + losses.seconds_away] += gone[t]
        there[t] = now
    return there, gone


def run(coming: Int[np.ndarray, " t"], there, gone, rate: float, batch: int) -> Day:
    """The day's queue; `there` and `gone` may be longer than `coming`, to work off what is left.

    rate: images per second of a worker. Waits are infinite for what is not done at the end.
    """
    seconds = len(there)
    coming = np.concatenate([coming, np.zeros(seconds - len(coming), coming.dtype)])
    done, queue, worked = np.zeros(seconds), np.zeros(seconds), 0.0
    waiting, debt = 0.0, 0.0  # debt: work that was lost and comes first
    for t in range(seconds):
        waiting += coming[t]
        debt += min(gone[t] * batch, waiting)
        room = there[t] * rate
        repaid = min(debt, room)
        debt -= repaid
        done[t] = min(waiting, room - repaid)
        waiting -= done[t]
        worked += repaid + done[t]
        queue[t] = waiting
    wait = waits(coming, done)
    came = coming > 0
    at = np.argsort(wait[came])
    order, share = wait[came][at], np.cumsum(coming[came][at]) / coming.sum()
    median, late = (float(order[np.searchsorted(share, q)]) for q in (0.5, 0.99))
    capacity = float(there.sum() * rate)
    total = float(coming.sum())
    busy, again = worked / capacity, (worked - done.sum()) / total
    return Day(median, late, float(order[-1]), queue.max(), busy, int(gone.sum()), again)


def waits(coming, done: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Seconds until the last image that came in each second is done, in order of arrival."""
    leave = np.searchsorted(np.cumsum(done), np.cumsum(coming) - 1e-6)
    return np.where(leave < len(done), leave - np.arange(len(done)), np.inf)


def fleet(load: Load, losses: Losses | None, rate: float, wait: float, seed: int) -> tuple:
    """(smallest number of workers, its Day) with 99% of the waits at most `wait` seconds."""
    coming = arrivals(load, np.random.default_rng(seed))

    def day(workers: int) -> Day:
        rng = np.random.default_rng([seed, workers])
        there, gone = staff(workers, losses, DAY + 3600, rng)  # an hour to work off the rest
        return run(coming, there, gone, rate, losses.batch if losses else 0)

    low, high = 0, int(np.ceil(coming.max() / rate)) + 1  # none is too few
    while day(high).wait_99 > wait:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if day(middle).wait_99 <= wait else (middle, high)
    return high, day(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=float, default=10e6, help="a day")
    parser.add_argument("--rate", type=float, nargs="+", default=[4.0], help="images/s, a worker")
    parser.add_argument("--price", type=float, nargs="+", default=[0.1], help="a worker's hour")
    parser.add_argument("--wait", type=float, nargs="+", default=[60.0], help="seconds, of 99%%")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if len(args.rate) != len(args.price) or min(args.rate + args.price) <= 0:
        parser.error("give as many --price as --rate, all above 0")
    load = Load(images=args.images)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for rate, price in zip(args.rate, args.price, strict=True):
        for wait in args.wait:
            for name, losses in (("none", None), ("daily", Losses())):
                n, day = fleet(load, losses, rate, wait, args.seed)
                cost = n * 24 * price / (load.images + load.bursts * load.burst_images) * 1e6
                told = f"{day.median_wait:.0f}, {day.wait_99:.0f}, {day.longest_wait:.0f}"
                print(
                    f"| {rate:g} | {wait:g} | {name} | {n} | {told} | {day.longest_queue:,.0f} | "
                    f"{day.busy:.0%} | {day.lost} | {day.again:.3%} | {cost:.2f} |"
                )


if __name__ == "__main__":
    main()
