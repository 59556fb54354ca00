"""Rows as the core reads them."""

from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """x [..., N] itself where it is contiguous, or [M, N] with a last stride of 1; else a copy."""
    if x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1):
        return x
    return x.contiguous()
