"""Times feed_forward with pytest-benchmark: `pytest benchmarks/feed_forward.py -k eager`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.feed_forward import FEED_FORWARD
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in FEED_FORWARD
        for peer in (OURS, *case.peers)
    ],
)
def test_feed_forward(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
