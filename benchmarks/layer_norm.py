"""Times layer_norm with pytest-benchmark: `pytest benchmarks/layer_norm.py -k torch`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.layer_norm import LAYER_NORM
from fastattn.testing.cases.peers import OURS


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in LAYER_NORM
        for peer in (OURS, *case.peers)
    ],
)
def test_layer_norm(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
