"""Gradients that kernels of a feed-forward op fill."""

from collections.abc import Sequence

import torch
from torch import Tensor


def allocate(inputs: Sequence[Tensor | None], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """One for each input, None where it is not needed. The first is x; weights have their own strides."""
    x = inputs[0]
    assert x is not None
    dx = x.new_empty(x.shape) if need[0] else None
    rest = zip(inputs[1:], need[1:], strict=True)
    return dx, *(torch.empty_like(y) if y is not None and needed else None for y, needed in rest)


def or_empty(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an op returns: tensors alone, an empty one for each None."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)
