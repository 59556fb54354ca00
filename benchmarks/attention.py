"""The cases of `python -m fastattn bench` for pytest-benchmark: `pytest benchmarks/attention.py`.

For those who want its statistics, storage and comparison over time. It times one peer after the
other; the verb lets them take turns, which is fairer, and is where published ratios come from.
"""

from itertools import cycle
from typing import Any

import pytest

from fastattn.testing import cases


@pytest.mark.parametrize("peer", ["fastattn", "sdpa"])
@pytest.mark.parametrize("case", cases.ATTENTION, ids=lambda case: f"{case.name} {case.dtype}")
def test_attention(benchmark: Any, case: cases.Case, peer: str) -> None:
    copies = cases.make_copies(case)
    benchmark.extra_info["errors"] = cases.check(case, copies[0], ["fastattn", "sdpa"])
    turn = cycle([cases.bind(peer, case, x) for x in copies])
    benchmark(lambda: next(turn)())
