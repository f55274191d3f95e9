"""Times of variants that run in turn, so that whatever else the machine does touches all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Times:
    """Seconds of each round: on the clock, and of processor time."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one variant takes than another: medians over rounds."""

    wall: float
    processor: float

    def __str__(self) -> str:
        return f"{_short(self.wall)} ({_short(self.processor)})"


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """One round to warm up, then every variant once a round."""
    times = {name: Times() for name in variants}
    for index in range(rounds + 1):
        for name, run in variants.items():
            seconds = timed(run)
            if index:
                times[name].wall.append(seconds[0])
                times[name].processor.append(seconds[1])
    return times


def timed(run: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def ratio(variant: Times, base: Times, rounds: Iterable[int] | None = None) -> Ratio:
    """Median over rounds of the ratio within a round: the machine may be slower in some rounds."""
    chosen = range(len(base.wall)) if rounds is None else list(rounds)
    return Ratio(
        median(variant.wall[i] / base.wall[i] for i in chosen),
        median(variant.processor[i] / base.processor[i] for i in chosen),
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
