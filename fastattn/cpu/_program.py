"""Records the launches of a function, to run them again as one call into the core."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.cpu._core import core

T = TypeVar("T")

# They give memory, and do not say what is in it.
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class _Watch(TorchDispatchMode):
    """Sees what the core does not see, and so would not run again."""

    refused: str | None = None  # the first of it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        returned = func._schema.returns
        is_view = bool(returned) and all(
            x.alias_info is not None and not x.alias_info.is_write for x in returned
        )
        if namespace != "fastattn" and name not in _ALLOCATIONS and not is_view and self.refused is None:
            self.refused = f"only fastattn's kernels can be recorded, and views of tensors; got {func}"
        return func(*args, **(kwargs or {}))


def record(function: Callable[[], T]) -> tuple[Callable[[], None] | str, T]:
    """Runs a function once; returns what runs it again, and what it returned, which that overwrites.

    What is in the memory is read when it runs: weights, caches, lengths. Sizes, options and the number of
    threads are those of the first time. Where the function does what is neither a kernel nor a view, the
    reason comes in place of what would run it again.

    Raises:
        ValueError: this thread is recording.
    """
    program, watch, threads = core.Program(), _Watch(), torch.get_num_threads()  # type: ignore[no-untyped-call]
    program.start()
    try:
        with watch:
            result = function()
    finally:
        program.stop()
    return watch.refused or (lambda: program.run(threads)), result
