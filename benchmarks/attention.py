"""Times attention with pytest-benchmark: `pytest benchmarks/attention.py -k sdpa`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.attention import ATTENTION
from fastattn.testing.cases.case import Case
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in ATTENTION
        for peer in (OURS, *case.peers)
    ],
)
def test_attention(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
