"""How a case is timed by pytest-benchmark, for those who want its statistics, storage and comparisons.

It times one peer after the other; `python -m fastattn bench` lets them take turns, which is fairer, and is
where published ratios come from.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.peers import OURS, forget_compiled


@pytest.fixture
def time_peer(benchmark: Any) -> Callable[[Case[Any], str], None]:
    """Times a peer on a case once ours has passed the error rule; skips where the peer cannot run it."""

    def run(case: Case[Any], peer: str) -> None:
        forget_compiled([peer])
        copies = case.make_copies()
        found = case.check(copies[0], [OURS, peer] if peer != OURS else [OURS])
        if peer in found.skipped:
            pytest.skip(found.skipped[peer])
        benchmark.extra_info["errors"] = found.errors
        turn = cycle([case.bind(peer, x).run for x in copies])
        benchmark(lambda: next(turn)())

    return run
