"""Processes that talk over gloo, each on one thread: for conftest.py, in a module that they can import."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 60  # for one call, of which a loaded machine needs few; a rank that hangs ends the test


class Processes:
    """Ranks 0 ... size - 1 of a process group. Calling it runs a function on all of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """What function(*args, **options) returns on each rank; raises what any of them raised."""
        for connection in self._connections:
            connection.send((function, args, options))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(SECONDS):
                self.end()
                raise TimeoutError(f"rank {rank} of {len(self._connections)} gave no answer to {function}")
            answers.append(connection.recv())
        for rank, (failed, answer) in enumerate(answers):
            if failed:
                raise AssertionError(f"rank {rank}: {answer}")
        return [answer for _, answer in answers]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)


def _serve(rank: int, size: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, args, options = connection.recv()
        try:
            connection.send((False, function(*args, **options)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
