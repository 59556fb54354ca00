"""Records the launches of a function, to run them again as one call into the core."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.cpu._core import core

T = TypeVar("T")

# They give memory, and do not say what is in it.
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class _OnlyLaunches(TorchDispatchMode):
    """Refuses what the core would not see, and so not run again."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        returned = func._schema.returns
        is_view = bool(returned) and all(
            x.alias_info is not None and not x.alias_info.is_write for x in returned
        )
        if namespace != "fastattn" and name not in _ALLOCATIONS and not is_view:
            raise RuntimeError(f"only fastattn's kernels can be recorded, and views of tensors; got {func}")
        return func(*args, **(kwargs or {}))


def record(function: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Runs a function once; returns what runs it again, and what it returned, which that overwrites.

    What is in the memory is read when it runs: weights, caches, lengths. Sizes, options and the number of
    threads are those of the first time.

    Raises:
        RuntimeError: the function does what is neither a kernel nor a view. ValueError: one is recorded.
    """
    program, threads = core.Program(), torch.get_num_threads()
    program.start()
    try:
        with _OnlyLaunches():  # type: ignore[no-untyped-call]
            result = function()
    finally:
        program.stop()
    return lambda: program.run(threads), result
