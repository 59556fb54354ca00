"""Times linear_cross_entropy with pytest-benchmark: `pytest benchmarks/linear_cross_entropy.py -k eager`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in LINEAR_CROSS_ENTROPY
        for peer in (OURS, *case.peers)
    ],
)
def test_linear_cross_entropy(
    time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str
) -> None:
    time_peer(case, peer)
