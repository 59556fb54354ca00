"""The clock that all published numbers come from."""

import gc
import time

import pytest

from fastattn.testing import roof
from fastattn.testing.timing import Spread, race


def test_spread_is_median_and_percentiles() -> None:
    assert Spread.of(range(11)) == Spread(5, 2, 8)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)


def test_race_finds_the_ratio() -> None:
    timing = race({"fast": [lambda: time.sleep(0.001)], "slow": [lambda: time.sleep(0.004)]}, budget=0.05)
    assert timing.rounds >= 5
    assert timing.seconds["fast"].p20 >= 0.001
    assert 1.5 < timing.ratios["slow"].median < 5.0
    assert list(timing.ratios) == ["slow"]


def test_race_takes_turns_and_everyone_goes_first() -> None:
    calls: list[str] = []

    def peer(name: str) -> None:
        calls.append(name)
        time.sleep(0.0002)  # long enough for one call to be a sample

    race({name: [lambda name=name: peer(name)] for name in "ab"}, budget=0.0, min_rounds=4)
    assert "".join(calls[-8:]) == "abba" * 2


def test_race_visits_a_copy_again_only_after_all_the_others() -> None:
    visited: list[int] = []

    def visit(copy: int) -> None:
        visited.append(copy)
        time.sleep(0.0002)

    copies = [lambda copy=copy: visit(copy) for copy in range(5)]
    race({"a": copies, "b": copies}, budget=0.0)
    assert visited == [i % 5 for i in range(len(visited))]


def test_short_calls_share_a_sample() -> None:
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1

    timing = race({"short": [short]}, budget=0.0)
    assert calls > 10 * timing.rounds
    assert timing.seconds["short"].median < 50e-6


def test_garbage_is_collected_again_after_a_failure() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        race({"fails": [fail]}, budget=0.1)
    assert gc.isenabled()


def test_roof_takes_the_higher_measurement_of_each() -> None:
    low = roof.Roof(100.0, 200.0, 30.0, 25.0, threads=2)
    high = roof.Roof(110.0, 190.0, 31.0, 24.0, threads=2)
    assert low.at_least(high) == roof.Roof(110.0, 200.0, 31.0, 25.0, threads=2)
    assert low.gflops("fp16") == low.gflops("fp32") == 100.0
    assert low.gflops("bf16") == 200.0


def test_the_limit_ends_before_the_rounds_are_full() -> None:
    calls = {"slow": [lambda: time.sleep(0.02)]}
    assert race(calls, budget=0.01, min_rounds=50, limit=0.05).rounds <= 4


def test_what_was_seen_is_the_warm_up_or_the_only_round() -> None:
    count = 0

    def slow() -> None:
        nonlocal count
        count += 1
        time.sleep(0.02)

    timing = race({"slow": [slow]}, budget=0.01, min_rounds=2, seen={"slow": 0.02})
    assert timing.rounds == count == 2
    timing = race({"slow": [slow]}, budget=0.01, limit=0.015, seen={"slow": 0.02})
    assert (timing.rounds, timing.seconds["slow"].median, count) == (1, 0.02, 2)
