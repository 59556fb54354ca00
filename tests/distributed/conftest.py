"""Processes that talk over gloo, started once for all tests."""

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Processes]]:
    running: dict[int, Processes] = {}
    folders = (tmp_path_factory.mktemp(f"ranks{at}") for at in itertools.count())

    def start(size: int) -> Processes:
        if size not in running or not running[size].alive():
            threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
            running[size] = Processes(size, next(folders))
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        return running[size]

    yield start
    for processes in running.values():
        processes.end()


@pytest.fixture
def ranks(request: pytest.FixtureRequest, _started: Callable[[int], Processes]) -> Processes:
    """As many as the test's mark `parametrize("ranks", [2, 4], indirect=True)` says."""
    return _started(request.param)
