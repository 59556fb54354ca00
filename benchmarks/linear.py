"""Times linear with pytest-benchmark: `pytest benchmarks/linear.py -k eager`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.linear import LINEAR
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in LINEAR
        for peer in (OURS, *case.peers)
    ],
)
def test_linear(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
