"""Which autoscaling settings meet a latency target for a given load, and at which cost per picture.

    python scripts/capacity.py --per-hour 120 --burst 100 --p95 30
    python scripts/capacity.py --trace arrivals.txt --p95 30 --plot capacity.png

Simulates the GPU class on Modal's documented behaviour: a container for every `concurrency` requests that
wait or run, plus `buffer` while any does, between `min` and `max`; an idle one is kept for the scale-down
window; every second of a container is paid for, its cold start included. A container's GPU does one
request at a time (`--service` seconds); what comes before and after on its CPU (`--beside`) overlaps with
the next. Not simulated: waiting for a GPU to be available, preemption, the CPU functions (a few per cent).

The trace is one arrival per line, in seconds; without one, requests come at random (Poisson) over a day
whose nights are quiet, and a burst comes at noon.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DAY = 24 * 3600.0
QUIET = 0.2
"""Of the day's rate, what is left of it at night (22:00 to 8:00)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds: from start to ready; on the GPU for a picture; on the CPU beside it. Dollars a second."""

    cold: float = 20.0
    service: float = 0.8
    beside: float = 0.2
    price: float = 0.001097


@dataclass(frozen=True, slots=True)
class Scaling:
    """The settings ZIMAGE_MIN_CONTAINERS and so on; window in seconds."""

    min: int = 0
    buffer: int = 0
    max: int = 10
    window: float = 60.0
    concurrency: int = 4

    def environment(self) -> dict[str, str]:
        return {
            "ZIMAGE_MIN_CONTAINERS": str(self.min),
            "ZIMAGE_BUFFER_CONTAINERS": str(self.buffer),
            "ZIMAGE_MAX_CONTAINERS": str(self.max),
            "ZIMAGE_SCALEDOWN_WINDOW": f"{self.window:.0f}",
            "ZIMAGE_CONCURRENCY": str(self.concurrency),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one simulation. Latencies in seconds; cost in dollars for all, and for one picture; busy: the
    share of paid seconds in which a GPU worked."""

    p50: float
    p95: float
    worst: float
    cost: float
    per_picture: float
    busy: float
    containers: int


class _Container:
    """ready: when it may take requests. free: when its GPU has done what it has."""

    __slots__ = ("active", "free", "idle_since", "ready", "started")

    def __init__(self, started: float, ready: float) -> None:
        self.started, self.ready, self.free = started, ready, ready
        self.active, self.idle_since = 0, ready


def simulate(arrivals: Sequence[float], scaling: Scaling, machine: Machine) -> Outcome:
    """`arrivals` are seconds in ascending order; a day's settings of `min` are paid from 0 to the end."""
    ticks = itertools.count()
    events: list[tuple[float, int, str, _Container | None]] = []
    for arrival in arrivals:
        heapq.heappush(events, (arrival, next(ticks), "arrival", None))
    containers: list[_Container] = []
    waiting: deque[float] = deque()
    latencies: list[float] = []
    paid, most = 0.0, 0

    def start(now: float, cold: float) -> None:
        container = _Container(now, now + cold)
        containers.append(container)
        heapq.heappush(events, (container.ready, next(ticks), "ready", container))

    def scale(now: float) -> None:
        outstanding = len(waiting) + sum(each.active for each in containers)
        wanted = math.ceil(outstanding / scaling.concurrency)
        wanted += scaling.buffer if outstanding else 0
        for _ in range(len(containers), min(max(wanted, scaling.min), scaling.max)):
            start(now, machine.cold)

    def dispatch(now: float) -> None:
        while waiting:
            free = [
                each
                for each in containers
                if each.ready <= now and each.active < scaling.concurrency
            ]
            if not free:
                return
            container = min(free, key=lambda each: (each.active, each.free))
            arrival = waiting.popleft()
            container.active += 1
            container.free = max(now, container.free) + machine.service
            done = container.free + machine.beside
            latencies.append(done - arrival)
            heapq.heappush(events, (done, next(ticks), "done", container))

    for _ in range(min(scaling.min, scaling.max)):
        start(0.0, 0.0)  # warm before the day begins
    now = 0.0
    while events:
        now, _, kind, container = heapq.heappop(events)
        if kind == "arrival":
            waiting.append(now)
        elif container is not None and kind in ("done", "ready"):
            container.active -= kind == "done"
            container.idle_since = now
        dispatch(now)
        scale(now)
        most = max(most, len(containers))
        if container is not None and container.active == 0 and container in containers:
            if kind == "idle" and now - container.idle_since >= scaling.window - 1e-9:
                if len(containers) > scaling.min:
                    containers.remove(container)
                    paid += now - container.started
            elif kind in ("done", "ready"):
                later = now + scaling.window
                heapq.heappush(events, (later, next(ticks), "idle", container))
    paid += sum(max(now, *arrivals[-1:], 0.0) - each.started for each in containers)
    latencies.sort()
    return Outcome(
        p50=_quantile(latencies, 0.5),
        p95=_quantile(latencies, 0.95),
        worst=latencies[-1],
        cost=paid * machine.price,
        per_picture=paid * machine.price / len(latencies),
        busy=len(latencies) * machine.service / paid,
        containers=most,
    )


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, math.ceil(share * len(ascending)) - 1)]


def a_day(per_hour: float, burst: int, seed: int = 0) -> list[float]:
    """Poisson arrivals at `per_hour` by day and a fifth of it by night; `burst` at once at noon."""
    draw = random.Random(seed)
    arrivals, now = [DAY / 2] * burst, 0.0
    while per_hour > 0:
        now += draw.expovariate(per_hour / 3600)
        if now >= DAY:
            break
        if 8 <= now / 3600 < 22 or draw.random() < QUIET:
            arrivals.append(now)
    return sorted(arrivals)


def read_trace(path: Path) -> list[float]:
    """Raises ValueError naming the line."""
    arrivals = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                arrivals.append(float(line))
            except ValueError:
                raise ValueError(f"{path}, line {number}: {line!r} is no number") from None
    if not arrivals:
        raise ValueError(f"{path} has no arrivals")
    first = min(arrivals)
    return sorted(arrival - first for arrival in arrivals)


def grid(max_containers: int) -> list[Scaling]:
    """What is worth trying."""
    return [
        Scaling(least, buffer, max_containers, window, concurrency)
        for least in (0, 1, 2)
        for buffer in (0, 1, 2)
        for window in (10.0, 30.0, 60.0, 180.0, 600.0, 1800.0)
        for concurrency in (1, 2, 4)
    ]


Tried = list[tuple[Scaling, Outcome]]


def best(tried: Tried, p95: float) -> tuple[Scaling, Outcome] | None:
    """The cheapest that meets the target; None if nothing does."""
    good = [each for each in tried if each[1].p95 <= p95]
    # To the cent: nobody waits ten times as long for a thousandth of one.
    return min(good, key=lambda each: (round(each[1].cost, 2), each[1].p95)) if good else None


def plot(tried: Tried, p95: float, path: Path) -> None:
    """Cost over latency, a point for each setting; the target as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for least in sorted({scaling.min for scaling, _ in tried}):
        some = [outcome for scaling, outcome in tried if scaling.min == least]
        axes.scatter(
            [outcome.p95 for outcome in some],
            [1000 * outcome.per_picture for outcome in some],
            s=14,
            label=f"{least} kept warm",
        )
    axes.axvline(p95, linestyle="--", linewidth=1, color="black", label=f"target {p95:g} s")
    axes.set(
        xlabel="p95 latency, s", ylabel="dollars per 1000 pictures", xscale="log", yscale="log"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Prints the settings that nothing cheaper beats, and the defaults; then the cheapest that "
        "meet the target,\nto export before a deploy. Exit code 1: none do.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def option(name: str, default: float, help: str) -> None:
        kind = type(default)
        unit = "N" if kind is int else "X"
        parser.add_argument(
            name, type=kind, default=default, metavar=unit, help=f"{help} (%(default)s)"
        )

    parser.add_argument("--trace", type=Path, help="arrivals in seconds, one per line")
    option("--per-hour", 120.0, "without a trace: requests an hour, 8:00 to 22:00")
    option("--burst", 100, "without a trace: requests at once, at noon")
    option("--p95", 30.0, "the target: seconds that 95 of 100 requests take at most")
    option("--max", 10, "containers at most, ZIMAGE_MAX_CONTAINERS")
    machine = Machine()
    option("--cold", machine.cold, "seconds from a container's start until it is ready")
    option(
        "--service", machine.service, "seconds of GPU for a request; scripts/bench.py gpu measures"
    )
    option("--beside", machine.beside, "seconds of the container's CPU for a request")
    option("--price", machine.price, "dollars for a second of the GPU; an H100's is the default")
    parser.add_argument("--plot", type=Path, help="a picture of all settings (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="everything that was tried")
    given = parser.parse_args()
    machine = Machine(given.cold, given.service, given.beside, given.price)
    try:
        arrivals = read_trace(given.trace) if given.trace else a_day(given.per_hour, given.burst)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    tried = [(each, simulate(arrivals, each, machine)) for each in grid(given.max)]
    tried.sort(key=lambda each: each[1].cost)
    chosen, default = best(tried, given.p95), Scaling(max=given.max)
    print(f"{len(arrivals)} requests; {machine}")
    print(
        f"{'min':>4} {'buf':>4} {'window':>7} {'conc':>5} {'p50':>7} {'p95':>7} {'worst':>7} $/1000"
    )
    frontier, least = [], math.inf
    for scaling, outcome in tried:  # those that nothing cheaper beats
        if outcome.p95 < least - 0.01:
            least = outcome.p95
            frontier.append((scaling, outcome))
    for scaling, outcome in [*frontier, (default, simulate(arrivals, default, machine))]:
        mark = "default" if scaling == default else ""
        mark = "chosen" if chosen and scaling == chosen[0] else mark
        print(
            f"{scaling.min:4} {scaling.buffer:4} {scaling.window:7.0f} {scaling.concurrency:5} "
            f"{outcome.p50:7.1f} {outcome.p95:7.1f} {outcome.worst:7.1f} "
            f"{1000 * outcome.per_picture:6.2f} {mark}"
        )
    if given.json:
        lines = [json.dumps({**asdict(scaling), **asdict(outcome)}) for scaling, outcome in tried]
        rows = ",\n  ".join(lines)
        given.json.write_text(
            f'{{"machine": {json.dumps(asdict(machine))},\n "tried": [{rows}]}}\n'
        )
    if given.plot:
        plot(tried, given.p95, given.plot)
    if chosen is None:
        print(f"nothing meets p95 {given.p95:g} s; allow more --max, or a faster --cold start")
        return 1
    print("\n".join(f"export {name}={value}" for name, value in chosen[0].environment().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
