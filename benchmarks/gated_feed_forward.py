"""Times gated_feed_forward with pytest-benchmark: `pytest benchmarks/gated_feed_forward.py -k eager`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.gated_feed_forward import GATED_FEED_FORWARD
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in GATED_FEED_FORWARD
        for peer in (OURS, *case.peers)
    ],
)
def test_gated_feed_forward(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
