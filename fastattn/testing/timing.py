"""Timing peers side by side: same process, same threads, taking turns.

One after the other would give each peer its own mood of the machine. Here every round runs all of
them, and speed is the median of the ratios within rounds, so that a slow second hits all alike.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# A sample shorter than this is spread over several calls: the clock itself takes about 0.05 us.
_SHORTEST_SAMPLE = 100e-6


@dataclass(frozen=True)
class Spread:
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread":
        """Summarises at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[math.floor(0.2 * last)], ordered[math.ceil(0.8 * last)]
        return cls(statistics.median(ordered), low, high)


@dataclass(frozen=True)
class Timing:
    """What `race` found.

    Attributes:
        seconds: per call, of every peer.
        ratios: how many times faster than each other peer the first one is, round by round.
        rounds: how often everyone was timed.
    """

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    rounds: int


def race(
    peers: Mapping[str, Sequence[Callable[[], object]]],
    budget: float,
    min_rounds: int = 5,
    limit: float = math.inf,
    seen: Mapping[str, float] | None = None,
) -> Timing:
    """Times peers in turn until the budget is spent.

    Args:
        peers: per name the same call on one or more copies of the inputs. The copies are taken in
            turn across all peers: with more of them than the caches hold, each call runs cold.
        budget: seconds for all peers together, warm-up not counted.
        min_rounds: are run even where they exceed the budget.
        limit: seconds after which there are no more rounds, however few they were.
        seen: seconds that one call of each peer took just before: a warm-up where that is longer than
            the budget, and the first round where all together exceed the limit.
    """
    names = list(peers)
    seen = seen or {}
    turn = itertools.count()

    def sample(name: str, calls: int) -> float:
        copies = peers[name]
        picked = [copies[next(turn) % len(copies)] for _ in range(calls)]
        start = time.perf_counter()
        for call in picked:
            call()
        return (time.perf_counter() - start) / calls

    def calls_a_sample(name: str) -> int:
        seconds = seen[name] if name in seen else sample(name, 1)
        if seconds <= budget:
            seconds = sample(name, 1)
        return max(1, math.ceil(_SHORTEST_SAMPLE / max(seconds, 1e-9)))

    samples: dict[str, list[float]] = {name: [] for name in names}
    if set(seen) >= set(names) and sum(seen[name] for name in names) > limit:
        samples = {name: [seen[name]] for name in names}
    else:
        with _no_gc():
            calls = {name: calls_a_sample(name) for name in names}
            for round_ in _rounds(budget, min_rounds, limit):
                # Each goes first in turn: whoever follows finds the other's leftovers in the caches.
                shift = round_ % len(names)
                for name in names[shift:] + names[:shift]:
                    samples[name].append(sample(name, calls[name]))

    ours = samples[names[0]]
    return Timing(
        seconds={name: Spread.of(found) for name, found in samples.items()},
        ratios={
            name: Spread.of(other / mine for mine, other in zip(ours, samples[name], strict=True))
            for name in names[1:]
        },
        rounds=len(ours),
    )


def _rounds(budget: float, min_rounds: int, limit: float) -> Iterator[int]:
    """0, 1, 2 and on, until the time is spent."""
    start = time.perf_counter()
    yield 0
    for round_ in itertools.count(1):
        spent = time.perf_counter() - start
        if spent >= limit or (spent >= budget and round_ >= min_rounds):
            return
        yield round_


@contextmanager
def _no_gc() -> Iterator[None]:
    """Keeps the garbage collector out of the samples."""
    was_enabled = gc.isenabled()
    gc.collect(1)  # what is new; all that was imported takes 70 ms
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
