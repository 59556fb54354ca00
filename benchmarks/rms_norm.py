"""Times rms_norm with pytest-benchmark: `pytest benchmarks/rms_norm.py -k torch`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.peers import OURS
from fastattn.testing.cases.rms_norm import RMS_NORM


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in RMS_NORM
        for peer in (OURS, *case.peers)
    ],
)
def test_rms_norm(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
