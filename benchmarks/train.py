"""Times steps of training with pytest-benchmark: `pytest benchmarks/train.py -k llama`."""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn.testing.cases.case import Case
from fastattn.testing.cases.peers import OURS
from fastattn.testing.cases.train import TRAIN


@pytest.mark.parametrize(
    ("case", "peer"),
    [
        pytest.param(case, peer, id=f"{case.name} {case.dtype}, {peer}")
        for case in TRAIN
        for peer in (OURS, *case.peers)
    ],
)
def test_train(time_peer: Callable[[Case[Any], str], None], case: Case[Any], peer: str) -> None:
    time_peer(case, peer)
