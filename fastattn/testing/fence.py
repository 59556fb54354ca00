"""Fences around memory: what a kernel reads or writes beside its tensors shows in the result."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ALL_BITS = 0xFF  # in every byte: a NaN in every floating type
_FENCE = 4096  # bytes; a multiple of the alignment that kernels may count on


def fenced(x: Tensor) -> Tensor:
    """A copy of x amid NaN in every dimension (True or the lowest number, by type), with unaligned rows."""
    fill = math.nan
    if not x.is_floating_point():
        fill = True if x.dtype is torch.bool else torch.iinfo(x.dtype).min
    around = x.new_full([size + 2 if size > 1 else size for size in x.shape], fill)
    inner = around[tuple(slice(1, -1) if size > 1 else slice(None) for size in x.shape)]
    return inner.copy_(x)


_EMPTY = (torch.empty, torch.empty_like, Tensor.new_empty)
_ZEROS = (torch.zeros, torch.zeros_like, Tensor.new_zeros)


class FencedAllocations(TorchFunctionMode):
    """While active, what `torch.empty` and its kin return is full of NaN and has a fence on both sides.

    Sees the allocations of Python code that runs right under it, not those within a call of an op.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            return self._fence(result)
        return self._fence(result).zero_() if func in _ZEROS else result

    def assert_intact(self) -> None:
        """Raises AssertionError where something was written outside of an allocation."""
        assert self._buffers, "no allocation was seen"
        for buffer in self._buffers:
            for side in (buffer[:_FENCE], buffer[-_FENCE:]):
                assert bool((side == _ALL_BITS).all()), "a kernel wrote outside of its output"

    def _fence(self, x: Tensor) -> Tensor:
        size = x.untyped_storage().nbytes() + 2 * _FENCE
        buffer = torch.full((size,), _ALL_BITS, dtype=torch.uint8, device=x.device)
        self._buffers.append(buffer)
        inner = buffer[_FENCE:-_FENCE].view(x.dtype)
        return inner.as_strided(x.shape, x.stride(), inner.storage_offset())
