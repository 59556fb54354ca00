"""Times rotary with pytest-benchmark: `pytest benchmarks/rotary.py -k torch`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.peers import OURS
from fastattn.testing.cases.rotary import ROTARY


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in ROTARY
        for peer in (OURS, *case.peers)
    ],
)
def test_rotary(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
